"""Where tails are kept: what each choice stores and serves."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from client.bench.cache.tails import CHOICES, SHAPES, replay
from client.bench.cache.workloads import BLOCK_TOKENS, GENERATORS, Namer, Request
from client.commands.app import app


def requests(*prompts: str) -> list[Request]:
    """A letter is a block."""
    namer = Namer()
    return [Request(float(time), namer.keys(prompt)) for time, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    ("choice", "used", "tails"),
    [
        ("ends of prompts", 5, 3),  # a prompt's last block is not full
        ("branch points seen", 2, 2),
        ("both (what WiCore does)", 5, 3),
        ("every 512 tokens", 7, 4),
        ("every 1,024 tokens", 6, 2),
    ],
)
def test_a_prompt_is_of_use_up_to_its_deepest_tail(choice: str, used: int, tails: int) -> None:
    found = replay(requests("abcx", "abcdy", "abz", "abw"), choice)
    assert found.held_tokens == 7 * BLOCK_TOKENS
    assert (found.used_tokens // BLOCK_TOKENS, found.tails) == (used, tails)


def test_more_tails_never_serve_less() -> None:
    asked = GENERATORS["agents"](1)
    found = {name: replay(asked, name) for name in CHOICES}
    assert found["every 512 tokens"].used_tokens >= found["every 1,024 tokens"].used_tokens
    assert found["both (what WiCore does)"].used_tokens >= found["ends of prompts"].used_tokens
    for outcome in found.values():
        assert outcome.used_tokens <= outcome.held_tokens
        assert all(outcome.bytes_per_token(shape) > shape.global_bytes for shape in SHAPES)


def test_the_command_tells_every_choice() -> None:
    run = CliRunner().invoke(app, ["bench", "tails", "--workload", "multi-turn", "--json"])
    assert {each["choice"] for each in json.loads(run.stdout)["choices"]} == set(CHOICES)
    shown = CliRunner().invoke(app, ["bench", "tails", "--workload", "multi-turn"]).stdout
    assert all(name in shown for name in CHOICES)
    assert CliRunner().invoke(app, ["bench", "tails", "--workload", "nothing"]).exit_code == 1
