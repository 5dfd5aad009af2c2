"""`wicore bench cache`: traces, baselines and replays agree with what can be told without them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from client.bench.cache.report import closed_gap
from client.bench.cache.simulate import POLICIES, SHARES, future_uses, replay
from client.bench.cache.workloads import GENERATORS, Request, conversation_trace
from client.commands.app import app

CAPACITY = 80


def some(workload: str) -> list[Request]:
    return GENERATORS[workload](3)[:150]


def lru_hits(requests: list[Request], capacity: int) -> int:
    """Plain LRU over whole prompts, written without the manager: (last use, depth) order."""
    held: dict[bytes, tuple[float, int]] = {}
    hits = 0
    for number, request in enumerate(requests):
        ids = [key.id for key in request.keys]
        found = next((index for index, one in enumerate(ids) if one not in held), len(ids))
        hits += found
        for index, one in enumerate(ids):
            if one not in held and len(held) >= capacity:
                others = held.keys() - set(ids)
                if not others:
                    break
                del held[min(others, key=lambda other: held[other])]
            held[one] = (number, -index)
    return hits


@pytest.mark.parametrize("workload", ["multi-turn", "agents", "shared-prompts"])
def test_lru_of_the_manager_is_lru(workload: str) -> None:
    requests = some(workload)
    blocks = sum(len(request.keys) for request in requests)
    outcome = replay(requests, "lru", CAPACITY, 1)
    assert outcome.token_hit_rate == pytest.approx(lru_hits(requests, CAPACITY) / blocks)


@pytest.mark.parametrize("workload", sorted(GENERATORS))
def test_nobody_beats_belady_and_all_find_everything_where_there_is_room(workload: str) -> None:
    requests = some(workload)
    every = len({key.id for request in requests for key in request.keys})
    best = replay(requests, "belady", CAPACITY, 1).token_hit_rate
    seen: set[bytes] = set()
    possible = 0
    for request in requests:
        possible += sum(key.id in seen for key in request.keys)
        seen |= {key.id for key in request.keys}
    for policy in POLICIES:
        assert replay(requests, policy, CAPACITY, 1).token_hit_rate <= best + 1e-9
        blocks = sum(len(request.keys) for request in requests)
        assert replay(requests, policy, every, 1).token_hit_rate == pytest.approx(possible / blocks)


@pytest.mark.parametrize("tiers", sorted(SHARES))
def test_a2cr_is_not_worse_than_lru_in_a_scan(tiers: int) -> None:
    requests = GENERATORS["scan"](5)[:500]
    outcomes = [replay(requests, policy, 400, tiers) for policy in ("lru", "a2cr", "belady")]
    assert outcomes[1].token_hit_rate > outcomes[0].token_hit_rate
    assert (outcomes[1].moved_down > 0) == (tiers > 1)
    if tiers == 1:
        gap = closed_gap(outcomes[1], outcomes)
        assert gap is not None
        assert 0.2 < gap < 1


def test_the_recorded_trace_is_whole() -> None:
    requests = conversation_trace()
    assert (len(requests), sum(len(request.keys) for request in requests)) == (12_031, 288_500)
    uses = future_uses(requests)
    assert 1 - len(uses) / 288_500 == pytest.approx(0.3664, abs=1e-4)


def test_the_command_prints_a_table_json_and_a_chart(tmp_path: object) -> None:
    plot = f"{tmp_path}/cache.svg"
    arguments = ["bench", "cache", "--workload", "agents", "--capacity", "100", "--tiers", "1", "--policy", "a2cr"]
    shown = CliRunner().invoke(app, [*arguments, "--policy", "lru", "--plot", plot])
    assert shown.exit_code == 0, shown.output
    assert "a2cr" in shown.output
    with open(plot, encoding="utf-8") as chart:
        assert chart.read().startswith("<svg")
    printed = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(printed.output)["replays"][0]["capacity"] == 100


def test_an_unknown_workload_is_refused_with_the_names_there_are() -> None:
    refused = CliRunner().invoke(app, ["bench", "cache", "--workload", "nothing"])
    assert refused.exit_code != 0
    assert "shared-prompts" in refused.output
