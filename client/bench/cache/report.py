"""Replays as a table and as a chart."""

from __future__ import annotations

from collections.abc import Sequence

from client.bench.cache.simulate import Outcome
from client.bench.plot import Chart
from client.bench.report import columns


def closed_gap(outcome: Outcome, among: Sequence[Outcome]) -> float | None:
    """Share of the way from LRU to Belady in the same setting; None where there is no such way or no such replay."""
    rates = {
        other.policy: other.token_hit_rate
        for other in among
        if (other.tiers, other.capacity) == (outcome.tiers, outcome.capacity)
    }
    if "lru" not in rates or rates.get("belady", 0.0) <= rates["lru"]:
        return None
    return (outcome.token_hit_rate - rates["lru"]) / (rates["belady"] - rates["lru"])


def table(outcomes: Sequence[Outcome]) -> str:
    """One row for each replay, settings together."""
    heads = [
        "policy",
        "tiers",
        "blocks",
        "hit rate",
        "2nd half",
        "of the gap",
        "TTFT mean s",
        "p50 s",
        "demoted",
        "µs/block",
    ]
    rows = []
    for outcome in outcomes:
        closed = closed_gap(outcome, outcomes)
        gap = "–" if closed is None else f"{closed:.0%}"
        rows.append(
            [
                outcome.policy, outcome.tiers, outcome.capacity, f"{outcome.token_hit_rate:.4f}",
                f"{outcome.late_hit_rate:.4f}", gap, f"{outcome.ttft_mean_s:.3f}",
                f"{outcome.ttft_p50_s:.3f}", outcome.moved_down, outcome.cpu_us_per_block,
            ]
        )  # fmt: skip
    return columns(heads, rows)


def chart(outcomes: Sequence[Outcome], title: str) -> Chart:
    """Token hit rate over capacity, one line for each policy, of the replays with one tier (or else the fewest)."""
    fewest = min(outcome.tiers for outcome in outcomes)
    drawn = Chart(title, "capacity, blocks", "token hit rate")
    for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
        points = [
            (float(outcome.capacity), outcome.token_hit_rate)
            for outcome in outcomes
            if outcome.policy == policy and outcome.tiers == fewest
        ]
        drawn.line(sorted(points), policy)
    return drawn
