"""`wicore bench attention`: what the engine reports of long conversations, and what replaying it changes."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from builders.build import Options, build
from builders.quantize import Precision
from client.bench.cache.attention import (
    OTHERS,
    TURNS,
    WEIGHTS,
    Asked,
    Talk,
    compare,
    record,
    requests_of,
    with_masses_of_others,
)
from client.bench.cache.simulate import replay
from client.commands.app import app
from tests.checkpoints import DEMO


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> list[Talk]:
    built = build(DEMO, tmp_path_factory.mktemp("demo"), Options(Precision.of("int8")))
    return record(built.manifest, 5, 0, lambda _: None)


def test_every_prompt_comes_with_the_masses_of_its_blocks(talks: list[Talk]) -> None:
    assert all(len(talk) >= TURNS[0] for talk in talks)
    for asked in (asked for talk in talks for asked in talk):
        assert len(asked.masses) == len(asked.blocks) > 0
        assert sum(asked.masses) / len(asked.masses) == pytest.approx(1.0, rel=1e-4), "relative to the prompt's mean"
        assert min(asked.masses) >= 0 < max(asked.masses)
    assert any(len(set(asked.masses)) > 3 for talk in talks for asked in talk)


def test_a_turn_goes_on_from_the_one_before_or_takes_its_place(talks: list[Talk]) -> None:
    grown = 0
    for talk in talks:
        for before, after in itertools.pairwise(talk):
            shared = sum(one == other for one, other in zip(before.blocks, after.blocks, strict=False))
            assert before.blocks[:shared] == after.blocks[:shared], "equal blocks are a beginning"
            grown += shared == len(before.blocks) < len(after.blocks)
    assert grown > len(talks)


def made_up(attended: float) -> list[Talk]:
    """Of two kinds of prompts, one block each, one comes again; its mass is ``attended``, the other's 1/16."""
    return [
        [Asked((bytes([kind, number]),), (attended if kind else 1 / 16,))] * (3 if kind else 1)
        for number in range(60)
        for kind in (0, 1)
    ]


def test_masses_that_tell_what_comes_again_raise_the_hit_rate_and_without_weight_they_do_nothing() -> None:
    requests = requests_of(made_up(16.0), 1)
    bare = [replace(request, masses=()) for request in requests]
    rates = {weight: replay(requests, "a2cr", 4, 1, attention_weight=weight).token_hit_rate for weight in WEIGHTS}
    assert rates[0.0] == replay(bare, "a2cr", 4, 1, attention_weight=1.0).token_hit_rate
    assert rates[1.0] > rates[0.0] + 0.05


def test_others_masses_are_those_of_prompts_as_long(talks: list[Talk]) -> None:
    swapped = with_masses_of_others(talks, 1)
    assert swapped != talks

    def asked(talks: list[Talk]) -> list[Asked]:
        return [asked for talk in talks for asked in talk]

    assert [each.blocks for each in asked(swapped)] == [each.blocks for each in asked(talks)]
    assert all(len(each.masses) == len(each.blocks) for each in asked(swapped))
    assert sorted(each.masses for each in asked(swapped)) == sorted(each.masses for each in asked(talks))


def test_gains_are_differences_of_the_same_draws() -> None:
    found = compare(made_up(16.0), 8, 3)
    assert list(found.by_weight) == ["0", *found.gains] == [*(f"{weight:g}" for weight in WEIGHTS), OTHERS]
    for name, (gain, error) in found.gains.items():
        assert gain == pytest.approx(found.by_weight[name] - found.by_weight["0"])
        assert 0 <= error < 0.1
    assert max(*found.by_weight.values(), found.lru) <= found.belady + 1e-9


def test_the_command_prints_a_table_and_json(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["bench", "attention", "--conversations", "2", "--capacity", "40"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "Belady" in shown.output
    printed = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert [each["capacity"] for each in printed["replays"]] == [40]
