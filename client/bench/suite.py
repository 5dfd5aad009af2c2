"""The measurements that `wicore bench engine` and `wicore bench serve` are made of."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.bench import machine
from client.bench.figures import (
    DecodeSpeed,
    Latencies,
    decode_speed,
    gaps,
    intrusion,
    kv_bytes,
    latencies,
    overlap,
    step_stats,
    weight_bytes,
)
from client.bench.load import Intrusion, Target, closed_loop, intrude, open_loop, together
from client.bench.prompts import Prompts
from client.bench.targets import EngineTarget
from python_backends import contract, manifest
from python_backends.config import Config
from python_backends.decoder.budget import SMALLEST_CHUNK
from python_backends.manifest import Manifest

WARM_UP_TOKENS = 4
BEFORE_TOKENS = 24
"""Tokens every decoding request has when the long prompt arrives, and draws after it at the least."""
LENGTHENED = (1, 2, 4, 8)
"""How many times ``output_tokens`` a batch decodes at most until its answers overlap."""


@dataclass(frozen=True)
class Plan:
    """Sizes, in tokens and requests."""

    prompt_tokens: int = 128
    output_tokens: int = 64
    prefill_tokens: int = 512
    long_tokens: int = 2048
    batches: tuple[int, ...] = (1, 4, 8)
    requests: int = 16
    """Of a closed or open loop."""
    repeats: int = 3
    """Of prefill and of every batch."""
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of context that the longest request needs, with room for a template and for padded chunks."""
        late = self.long_tokens + self.output_tokens
        answer = max(LENGTHENED[-1] * self.output_tokens, self.intruded_tokens)
        return 64 + max(late, self.prompt_tokens + answer, self.prefill_tokens)

    @property
    def intruded_tokens(self) -> int:
        """Answer tokens that outlast the long prompt even in the smallest chunks."""
        return 2 * BEFORE_TOKENS + self.long_tokens // SMALLEST_CHUNK


def settings_for(plan: Plan, settings: Config, *, drafts: bool, target_ms: int | None = None) -> Config:
    """The repository's configuration with slots for the largest batch, and drafts off unless they are to be measured:
    what they gain depends on the text, and text of random weights repeats itself. ``target_ms`` replaces its
    inter-token target.
    """
    return dataclasses.replace(
        settings,
        max_batch_size=max(plan.batches),
        max_context_length=max(plan.longest, settings.prefill_chunk + 64),
        max_draft=settings.max_draft if drafts else 0,
        target_inter_token_ms=target_ms or settings.target_inter_token_ms,
    )


def warm_up(target: Target, prompts: Prompts, plan: Plan) -> None:
    """Run every batch size once, so that memory is resident and kernels have packed their weights."""
    for batch in plan.batches:
        together(target, [prompts.job(plan.prompt_tokens, WARM_UP_TOKENS) for _ in range(batch)])
    together(target, [prompts.job(plan.prefill_tokens, 1)])


def prefill(target: Target, prompts: Prompts, plan: Plan) -> dict[str, float]:
    """Time to the only token of a prompt that comes alone; the median of the repeats, and tokens a second by it."""
    times, tokens = [], 0
    for _ in range(plan.repeats):
        job = prompts.job(plan.prefill_tokens, 1)
        (trace,) = together(target, [job])
        figures = latencies([trace])
        times.append(figures.ttft_p50_ms)
        tokens = len(job.input_ids)
    ttft = statistics.median(times)
    return {"prompt_tokens": tokens, "ttft_ms": ttft, "tokens_per_s": 1e3 * tokens / ttft}


def decode(target: Target, prompts: Prompts, plan: Plan, batch: int) -> DecodeSpeed:
    """One batch that begins together; answers are made longer where the first ends before the last begins.

    Raises:
        ServerUnavailableError: as `decode_speed`.
    """
    for factor in LENGTHENED:
        jobs = [prompts.job(plan.prompt_tokens, factor * plan.output_tokens) for _ in range(batch)]
        begin = time.process_time()
        traces = together(target, jobs)
        cpu_s = time.process_time() - begin
        if overlap(traces) or factor == LENGTHENED[-1]:
            break
    return decode_speed(traces, len(jobs[0].input_ids), cpu_s)


def middle(runs: Sequence[DecodeSpeed]) -> DecodeSpeed:
    """The run of the median speed."""
    return sorted(runs, key=lambda run: run.tokens_per_s)[len(runs) // 2]


def closed(target: Target, prompts: Prompts, plan: Plan, concurrency: int) -> dict[str, Any]:
    """Closed loop at a concurrency: its latencies, and what the engine's steps did."""
    jobs = prompts.stream(plan.prompt_tokens, plan.output_tokens)
    before = target.stats()
    found = latencies(closed_loop(target, jobs, concurrency, max(plan.requests, concurrency)))
    steps = step_stats(before, target.stats())
    return {"concurrency": concurrency, **dataclasses.asdict(found), "steps": steps}


def opened(target: Target, prompts: Prompts, plan: Plan, rate: float) -> Latencies:
    """Poisson arrivals, ``rate`` requests a second."""
    jobs = prompts.stream(plan.prompt_tokens, plan.output_tokens)
    return latencies(open_loop(target, jobs, rate, plan.requests, plan.seed))


def floor(built: Manifest, run: DecodeSpeed, bandwidth: float) -> dict[str, float]:
    """How near a decode step comes to reading its weights and live KV once at the measured bandwidth."""
    weights, kv = weight_bytes(built, contract.DECODER), run.batch * kv_bytes(built, run.context)
    least = 1e3 * (weights + kv) / bandwidth
    return {"weight_bytes": weights, "kv_bytes": kv, "floor_ms": least, "share": least / run.step_ms}


def long_prompt(target: Target, prompts: Prompts, plan: Plan, decoding: int) -> Intrusion:
    """A long prompt amid ``decoding`` requests."""
    jobs = [prompts.job(plan.prompt_tokens, plan.intruded_tokens) for _ in range(decoding)]
    return intrude(target, jobs, prompts.job(plan.long_tokens, plan.output_tokens), BEFORE_TOKENS)


def timeline(found: Intrusion) -> dict[str, Any]:
    """For a plot: seconds from the first arrival."""
    origin = min(trace.arrival_s for trace in found.decoding)
    points = sorted((at - origin, 1e3 * gap) for trace in found.decoding for at, gap in gaps(trace))
    return {
        "points_s_ms": [[round(at, 4), round(gap, 2)] for at, gap in points],
        "long_arrival_s": found.long.arrival_s - origin,
        "long_first_token_s": found.long.stamps[0] - origin,
    }


def measure_engine(target: EngineTarget, repository: Path, plan: Plan, settings: Config, report: Any) -> dict[str, Any]:
    """Everything that `wicore bench engine` shows, as JSON values.

    Args:
        target: an engine on ``repository`` with ``settings``.
        repository: of the manifest and the tokenizer.
        plan: sizes.
        settings: as `settings_for` made them.
        report: called with a line of text when something is about to be measured.

    Raises:
        WiCoreError: a request failed.
    """
    built, prompts = manifest.read(repository), Prompts(repository, plan.seed)
    report("measuring the memory …")
    bandwidth = machine.memory_bandwidth(machine.compute_threads(settings.num_threads))
    report("warming up …")
    warm_up(target, prompts, plan)
    decoded: dict[int, list[DecodeSpeed]] = {batch: [] for batch in plan.batches}
    for number in range(plan.repeats):
        for batch, runs in decoded.items():
            report(f"decoding, batch {batch}, run {number + 1} of {plan.repeats} …")
            runs.append(decode(target, prompts, plan, batch))
    report("prefill …")
    filled = prefill(target, prompts, plan)
    report("closed loop …")
    loop = closed(target, prompts, plan, max(plan.batches))
    best = max(bandwidth.values())
    values: dict[str, Any] = {
        "bandwidth_bytes_per_s": bandwidth,
        "decode": [
            {**dataclasses.asdict(middle(runs)), **floor(built, middle(runs), best)} for runs in decoded.values()
        ],
        "decode_runs_tokens_per_s": {str(batch): [run.tokens_per_s for run in runs] for batch, runs in decoded.items()},
        "prefill": filled,
        "closed_loop": loop,
    }
    if max(plan.batches) > 1 and plan.long_tokens:
        report("a long prompt amid decoding requests …")
        found = long_prompt(target, prompts, plan, max(plan.batches) - 1)
        values["long_prompt"] = {
            "decoding": len(found.decoding),
            "prompt_tokens": plan.long_tokens,
            "target_inter_token_ms": settings.target_inter_token_ms,
            "ttft_ms": 1e3 * (found.long.stamps[0] - found.long.arrival_s),
            **intrusion(found),
            "timeline": timeline(found),
        }
    return values


def configuration(repository: Path, plan: Plan, settings: Config) -> dict[str, Any]:
    """What a reader must know to repeat a run."""
    built = manifest.read(repository)
    model = built.model
    return {
        "processor": machine.processor(),
        "cores": machine.cores(),
        "threads": machine.compute_threads(settings.num_threads),
        "versions": machine.versions(),
        "model": built.name,
        "shape": f"{model.num_layers} layers × {model.hidden_size}, {model.num_heads}/{model.num_kv_heads} heads of "
        f"{model.head_dim}, window {model.sliding_window}, vocabulary {model.vocab_size:,}",
        "precision": built.precision,
        "block": built.block_size,
        "symmetric": built.symmetric,
        "runtime": built.runtime,
        "slots": settings.max_batch_size,
        "context": settings.max_context_length,
        "prefill_chunk": settings.prefill_chunk,
        "max_draft": settings.max_draft,
        "target_inter_token_ms": settings.target_inter_token_ms,
        "cpu_kernels": settings.cpu_kernels,
        "plan": dataclasses.asdict(plan),
    }
