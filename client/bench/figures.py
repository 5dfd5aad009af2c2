"""From the times of tokens to figures. Milliseconds and tokens per second throughout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from client.bench.load import Intrusion, Trace
from python_backends.errors import ServerUnavailableError
from python_backends.manifest import Manifest


@dataclass(frozen=True)
class Latencies:
    """How a run felt to its callers."""

    requests: int
    failed: int
    output_tokens: int
    output_tokens_per_s: float
    """Over the time from the first arrival to the last token."""
    requests_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float


@dataclass(frozen=True)
class DecodeSpeed:
    """Decoding while the whole batch decodes, from its last first token to its first last one."""

    batch: int
    tokens_per_s: float
    step_ms: float
    """Mean time from a token to the next of the same answer."""
    inter_token_p50_ms: float
    inter_token_p99_ms: float
    context: float
    """Mean tokens in the cache of a sequence."""
    cpu_us_per_token: float = 0.0
    """CPU time of this process by every token of the run: the client's alone where a server answers."""


def gaps(trace: Trace) -> list[tuple[float, float]]:
    """(when it came, seconds since the one before) of every token but the first; tokens of one piece share its gap."""
    found: list[tuple[float, float]] = []
    stamps = trace.stamps
    index = 1
    while index < len(stamps):
        last = index
        while last + 1 < len(stamps) and stamps[last + 1] == stamps[index]:
            last += 1
        count = last - index + 1
        found += [(stamps[index], (stamps[index] - stamps[index - 1]) / count)] * count
        index = last + 1
    return found


def latencies(traces: Sequence[Trace]) -> Latencies:
    """Figures of a closed or open loop.

    Raises:
        ServerUnavailableError: no request was answered; the message has the first error.
    """
    answered = [trace for trace in traces if trace.stamps and not trace.error]
    if not answered:
        raise ServerUnavailableError(f"no request was answered: {traces[0].error or 'no token came'}")
    ttft = [1e3 * (trace.stamps[0] - trace.arrival_s) for trace in answered]
    between = [1e3 * gap for trace in answered for _, gap in gaps(trace)] or [0.0]
    tokens = sum(len(trace.stamps) for trace in answered)
    seconds = max(trace.stamps[-1] for trace in answered) - min(trace.arrival_s for trace in traces)
    return Latencies(
        requests=len(answered),
        failed=len(traces) - len(answered),
        output_tokens=tokens,
        output_tokens_per_s=tokens / seconds,
        requests_per_s=len(answered) / seconds,
        ttft_p50_ms=percentile(ttft, 50),
        ttft_p99_ms=percentile(ttft, 99),
        inter_token_p50_ms=percentile(between, 50),
        inter_token_p99_ms=percentile(between, 99),
    )


def overlap(traces: Sequence[Trace]) -> bool:
    """Whether the whole batch decoded at one time, or a request failed and there is nothing to wait for."""
    if any(trace.error or not trace.stamps for trace in traces):
        return True
    begin, end = max(trace.stamps[0] for trace in traces), min(trace.stamps[-1] for trace in traces)
    return any(begin < at <= end for trace in traces for at, _ in gaps(trace))


def decode_speed(traces: Sequence[Trace], prompt_tokens: int, cpu_s: float = 0.0) -> DecodeSpeed:
    """Figures of a batch that began together.

    Raises:
        ServerUnavailableError: a request failed, or the first answer ended before the last began.
    """
    failed = next((trace.error for trace in traces if trace.error), None)
    if failed is not None:
        raise ServerUnavailableError(f"a request failed: {failed}")
    begin = max(trace.stamps[0] for trace in traces)
    end = min(trace.stamps[-1] for trace in traces)
    inside = [gap for trace in traces for at, gap in gaps(trace) if begin < at <= end]
    if not inside:
        raise ServerUnavailableError("answers did not overlap; ask for more tokens (--output-tokens)")
    between = [1e3 * gap for gap in inside]
    speed = len(inside) / (end - begin)
    contexts = [prompt_tokens + index for trace in traces for index, at in enumerate(trace.stamps) if begin < at <= end]
    return DecodeSpeed(
        batch=len(traces),
        tokens_per_s=speed,
        step_ms=1e3 * len(traces) / speed,
        inter_token_p50_ms=percentile(between, 50),
        inter_token_p99_ms=percentile(between, 99),
        context=float(np.mean(contexts)),
        cpu_us_per_token=1e6 * cpu_s / sum(len(trace.stamps) for trace in traces),
    )


def intrusion(found: Intrusion) -> dict[str, dict[str, float]]:
    """Inter-token latency of the decoding requests before, during and after the long prompt's prefill.

    A gap counts as *during* where any of it lies between the long prompt's arrival and its first token.
    """
    begin, end = found.long.arrival_s, found.long.stamps[0] if found.long.stamps else found.long.ended_s
    parts: dict[str, list[float]] = {"before": [], "during": [], "after": []}
    for trace in found.decoding:
        for at, gap in gaps(trace):
            part = "before" if at < begin else "after" if at - gap > end else "during"
            parts[part].append(1e3 * gap)
    return {
        name: {
            "tokens": len(values),
            "inter_token_p50_ms": percentile(values, 50),
            "inter_token_p99_ms": percentile(values, 99),
            "inter_token_max_ms": max(values),
        }
        for name, values in parts.items()
        if values
    }


def percentile(values: Sequence[float], which: float) -> float:
    """Linear between the two nearest."""
    return float(np.percentile(np.asarray(values, np.float64), which))


def weight_bytes(manifest: Manifest, decoder: str) -> int:
    """Bytes of weights a decode step reads: every one, for the embedding is the head too."""
    return sum(file.size for file in manifest.stages[decoder].files if not file.name.endswith(".onnx"))


def kv_bytes(manifest: Manifest, tokens: float) -> float:
    """Bytes of KV that a decode step reads for one sequence of so many tokens."""
    model = manifest.model
    item = 4 if manifest.precision == "fp32" else 2
    row = 2 * model.num_kv_heads * model.head_dim * item
    visible = {"local": min(tokens, model.sliding_window), "global": tokens}
    return sum(row * visible[kind] for kind in model.layer_types)


def step_stats(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What an engine's steps did between two readings of its `Stats`."""
    change = {name: after[name] - before[name] for name in after if name != "padding_share"}
    useful = change["prefill_tokens"] + change["decode_rows"] + change["accepted_tokens"]
    refused = change["drafted_tokens"] - change["accepted_tokens"]
    computed = max(1, change["computed_tokens"])
    return {
        "prefill_steps": change["prefill_steps"],
        "decode_steps": change["decode_steps"],
        "decode_rows_per_step": change["decode_rows"] / max(1, change["decode_steps"]),
        "decode_step_ms": 1e3 * change["decode_seconds"] / max(1, change["decode_steps"]),
        "prefill_tokens_per_s": change["prefill_tokens"] / max(1e-9, change["prefill_seconds"]),
        "occupancy": useful / computed,
        "padding": max(0.0, 1 - (useful + refused) / computed),
    }
