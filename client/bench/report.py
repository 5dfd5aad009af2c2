"""Results as text for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from client.bench.plot import Chart


def columns(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table: the first column to the left, the others to the right."""
    shown = [[_shown(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *shown, strict=True)]
    lines = []
    for row in (heads, *shown):
        first, *others = [
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join([first, *others]))
    return "\n".join(lines)


def _shown(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def configuration_text(values: Mapping[str, Any]) -> str:
    """Every setting on one line each."""
    lines = []
    for name, value in values.items():
        text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, Mapping) else value
        lines.append(f"{name:<14}{text}")
    return "\n".join(lines)


def engine_text(found: Mapping[str, Any]) -> str:
    """What `wicore bench engine` prints."""
    bandwidth = found["bandwidth_bytes_per_s"]
    rows = [
        [
            f"batch {run['batch']}", run["tokens_per_s"], run["step_ms"], run["inter_token_p50_ms"],
            run["inter_token_p99_ms"], run["floor_ms"], f"{run['share']:.0%}",
        ]
        for run in found["decode"]
    ]  # fmt: skip
    heads = ["decode", "tokens/s", "step ms", "p50 ms", "p99 ms", "floor ms", "of floor"]
    filled, loop = found["prefill"], found["closed_loop"]
    parts = [
        f"memory: read {bandwidth['read'] / 1e9:.1f} GB/s, copy {bandwidth['copy'] / 1e9:.1f} GB/s",
        columns(heads, rows),
        f"prefill of {filled['prompt_tokens']} tokens: {filled['tokens_per_s']:.0f} tokens/s, "
        f"first token after {filled['ttft_ms']:.0f} ms",
        latency_table([("closed loop", loop["concurrency"], loop)]),
        steps_text(loop["steps"]),
    ]
    if "long_prompt" in found:
        parts.append(intrusion_text(found["long_prompt"]))
    return "\n\n".join(parts)


def steps_text(steps: Mapping[str, float]) -> str:
    """What an engine's steps did, on one line."""
    return (
        f"steps: {steps['occupancy']:.1%} of computed tokens were useful, {steps['padding']:.1%} padding, "
        f"{steps['decode_rows_per_step']:.2f} rows a decode step, {steps['decode_step_ms']:.1f} ms each"
    )


def latency_table(rows: Sequence[tuple[str, object, Mapping[str, Any]]]) -> str:
    """(name, load, `Latencies` as a mapping) as a table."""
    heads = ["load", "at", "requests", "failed", "tokens/s", "TTFT p50 ms", "p99", "inter-token p50 ms", "p99"]
    names = ("requests", "failed", "output_tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "inter_token_p50_ms",
             "inter_token_p99_ms")  # fmt: skip
    return columns(heads, [[label, at, *(values[name] for name in names)] for label, at, values in rows])


def intrusion_text(found: Mapping[str, Any]) -> str:
    """A long prompt's effect on those that decode."""
    rows = [
        [name, part["tokens"], part["inter_token_p50_ms"], part["inter_token_p99_ms"], part["inter_token_max_ms"]]
        for name in ("before", "during", "after")
        if (part := found.get(name))
    ]
    return (
        f"a prompt of {found['prompt_tokens']} tokens amid {found['decoding']} decoding requests: its first token "
        f"after {found['ttft_ms']:.0f} ms; target {found['target_inter_token_ms']} ms between tokens\n"
        + columns(["inter-token", "tokens", "p50 ms", "p99 ms", "max ms"], rows)
    )


def intrusion_chart(found: Mapping[str, Any], title: str) -> Chart:
    """Inter-token latency over time, with the target and the stretch of the long prompt's prefill."""
    times = found["timeline"]
    chart = Chart(title, "seconds", "inter-token latency, ms")
    chart.band(times["long_arrival_s"], times["long_first_token_s"], f"prefill of {found['prompt_tokens']} tokens")
    chart.points([(at, gap) for at, gap in times["points_s_ms"]], f"{found['decoding']} decoding requests")
    chart.level(found["target_inter_token_ms"], f"target {found['target_inter_token_ms']} ms")
    return chart
