"""What the gateway adds to a first token and between tokens: the same load through it and past it, in turns."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from client.bench.figures import Latencies, decode_speed, latencies, overlap
from client.bench.load import Target, Trace, together
from client.bench.prompts import Prompts
from client.bench.report import columns
from client.bench.suite import Plan, warm_up
from python_backends.errors import ServerUnavailableError


def measure_gateway(direct: Target, through: Target, prompts: Prompts, plan: Plan, report: Any) -> dict[str, Any]:
    """What `wicore bench gateway` shows, as JSON values.

    Args:
        direct: the server over gRPC.
        through: the gateway before the same server.
        prompts: of the served model.
        plan: sizes; every batch is a number of streams that begin together, ``repeats`` times on either side.
        report: called with a line of text when something is about to be measured.

    Raises:
        WiCoreError: a request failed, or an answer has not as many tokens as it was to have.
    """
    report("warming up …")
    for target in (direct, through):
        warm_up(target, prompts, plan)
    values = []
    for streams in plan.batches:
        runs: dict[str, list[list[Trace]]] = {direct.name: [], through.name: []}
        for number in range(plan.repeats):
            report(f"{streams} streams, round {number + 1} of {plan.repeats} …")
            order = (direct, through) if number % 2 == 0 else (through, direct)
            for target in order:
                runs[target.name].append(_run(target, prompts, plan, streams))
        values.append({"streams": streams, **compared(runs[direct.name], runs[through.name])})
    return {"streams": values}


def _run(target: Target, prompts: Prompts, plan: Plan, streams: int) -> list[Trace]:
    jobs = [prompts.job(plan.prompt_tokens, plan.output_tokens) for _ in range(streams)]
    traces = together(target, jobs)
    for trace in traces:
        if trace.error or len(trace.stamps) != plan.output_tokens:
            told = trace.error or f"{len(trace.stamps)} tokens instead of {plan.output_tokens}"
            raise ServerUnavailableError(f"{target.name}: {told}")
    return traces


def compared(direct: Sequence[Sequence[Trace]], through: Sequence[Sequence[Trace]]) -> dict[str, Any]:
    """The rounds of either side beside each other, and what the gateway adds: the median over pairs of rounds.

    A round's first-token time is the mean over its streams; its time between tokens is taken while all of them decode
    (`DecodeSpeed.step_ms`), where they do.
    """
    sides = {"direct": direct, "through": through}
    ttft = {name: [_ttft_ms(traces) for traces in rounds] for name, rounds in sides.items()}
    between = {name: [_between_ms(traces) for traces in rounds] for name, rounds in sides.items()}
    added = [after - before for before, after in zip(ttft["direct"], ttft["through"], strict=True)]
    shares = [after / before - 1 for before, after in zip(between["direct"], between["through"], strict=True)]
    return {
        **{name: _shown(rounds, ttft[name], between[name]) for name, rounds in sides.items()},
        "ttft_added_ms": statistics.median(added),
        "ttft_added_mean_ms": statistics.fmean(added),
        "ttft_added_quartiles_ms": statistics.quantiles(added, n=4)[::2] if len(added) > 1 else added * 2,
        "inter_token_added_share": statistics.median(shares),
        "inter_token_added_ms": statistics.median(between["through"]) - statistics.median(between["direct"]),
        "inter_token_added_quartiles": statistics.quantiles(shares, n=4)[::2] if len(shares) > 1 else shares * 2,
    }


def _shown(rounds: Sequence[Sequence[Trace]], ttft: Sequence[float], between: Sequence[float]) -> dict[str, Any]:
    found: Latencies = latencies([trace for traces in rounds for trace in traces])
    values = {name: value for name, value in dataclasses.asdict(found).items() if not name.endswith("per_s")}
    return {**values, "ttft_ms": statistics.median(ttft), "inter_token_ms": statistics.median(between)}


def _ttft_ms(traces: Sequence[Trace]) -> float:
    return 1e3 * statistics.fmean(trace.stamps[0] - trace.arrival_s for trace in traces)


def _between_ms(traces: Sequence[Trace]) -> float:
    if overlap(traces):
        return decode_speed(traces, 0).step_ms
    return 1e3 * statistics.fmean((trace.stamps[-1] - trace.stamps[0]) / (len(trace.stamps) - 1) for trace in traces)


def text(found: Mapping[str, Any]) -> str:
    """As a person reads it."""
    rows = [
        [f"{run['streams']}", run["direct"]["ttft_ms"], run["through"]["ttft_ms"], f"{run['ttft_added_ms']:+.2f}",
         f"{run['direct']['inter_token_ms']:.2f}", f"{run['through']['inter_token_ms']:.2f}",
         f"{run['inter_token_added_share']:+.1%}"]
        for run in found["streams"]
    ]  # fmt: skip
    heads = ["streams", "TTFT direct ms", "gateway", "added", "inter-token direct ms", "gateway", "added"]
    return columns(heads, rows)
