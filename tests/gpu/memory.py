"""What a decoder takes of the card: allocated, and as the driver sees it, from warm-up to a full context."""

from __future__ import annotations

import time

from cuda.bindings import driver as cu

from python_backends.runtime.gpu.driver import check
from python_backends.runtime.gpu.warm_up import warm_up
from tests.gpu.report import Report
from tests.gpu.steps import Bench

DECODED = 256
"""Steps behind the prompt."""


def used_bytes() -> int:
    """Of the card's memory, by everybody, the CUDA context included."""
    free, total = check(cu.cuMemGetInfo())
    return int(total - free)


def memory_use(report: Report, bench: Bench, chunk: int, used_at_start: int) -> None:
    """Warm up as a server does, compute a prompt that fills slot 0 up to its last steps, and decode those.

    ``used_at_start`` is what was in use before anything was allocated; nothing else may run on the card.
    """
    decoder, device = bench.decoder, bench.device
    loaded = used_bytes()
    began = time.perf_counter()
    recordings = warm_up(decoder, device.compile_all, chunk=chunk, attention_block=decoder.kv_layout.block_tokens)
    device.synchronize()
    warmed_up = time.perf_counter()
    allocated, used = device.allocated_bytes, used_bytes()
    peak = used
    context = decoder.spec.max_context_length
    past, prompt = 0, context - DECODED
    while past < prompt:
        count = min(chunk, prompt - past)
        decoder.step(bench.inputs(1, past, count))
        past += count
        peak = max(peak, used_bytes())
    computed = time.perf_counter()
    for past in range(prompt, context):
        decoder.step(bench.inputs(1, past))
        peak = max(peak, used_bytes())
    decoded = time.perf_counter()
    kv = decoder.kv
    report.row(
        "memory-use",
        slots=decoder.spec.num_slots,
        context=context,
        limit_gb=device.memory_limit / 1e9,
        kv_gb=(kv.global_pool.num_bytes + kv.local_pool.num_bytes) / 1e9,
        kv_of_a_sequence_gb=bench.kv_bytes([context]) / 1e9,
        weights_gb=bench.weights.num_bytes / 1e9,
        allocated_gb=allocated / 1e9,
        context_gb=used_at_start / 1e9,
        used_when_loaded_gb=loaded / 1e9,
        used_when_warm_gb=used / 1e9,
        peak_gb=peak / 1e9,
        peak_without_context_gb=(peak - used_at_start) / 1e9,
        allocated_later_bytes=device.allocated_bytes - allocated,
        used_later_bytes=peak - used,
        recordings=recordings,
        recordings_later=len(decoder.recordings) - recordings,
        warm_up_s=warmed_up - began,
        prefill_s=computed - warmed_up,
        prefill_tokens_per_s=prompt / (computed - warmed_up),
        decode_ms=1e3 * (decoded - computed) / DECODED,
    )
