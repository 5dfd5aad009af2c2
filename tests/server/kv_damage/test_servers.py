"""Servers that are killed or share a folder: answers stay right, and what was acknowledged is there."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading

import pytest

from python_backends.errors import WiCoreError
from tests.server.kv_damage.place import QUESTIONS, Expected, Place, answers_are_right, ask, page


def test_of_two_servers_on_one_folder_the_second_does_without_and_both_are_right(
    place: Place, expected: Expected
) -> None:
    with place.serve() as (_, first), place.serve() as (second_server, second):
        assert answers_are_right(second, expected)["nvme"] == 0
        assert answers_are_right(first, expected)["nvme"] > 0
        assert 'tier="nvme"' not in page(second_server.addresses.metrics)
        assert "in use by another server" in second_server.log_path.read_text(errors="replace")
    assert place.check() > 60


@pytest.mark.parametrize("rounds", [2, pytest.param(200, marks=pytest.mark.soak)])
def test_a_server_killed_at_random_moments_of_a_write_heavy_load_is_right_when_it_is_back(
    place: Place, expected: Expected, rounds: int
) -> None:
    draw = random.Random(rounds)
    found = 0
    for number in range(rounds):
        with contextlib.suppress(WiCoreError), place.serve() as (server, client):
            found += answers_are_right(client, expected).get("nvme", 0)
            assert server.pid is not None
            killer = threading.Timer(draw.uniform(0, 2.5), os.killpg, (server.pid, signal.SIGKILL))
            killer.start()
            for turn in range(10_000):
                asked = draw.randrange(len(QUESTIONS))
                answer = ask(client, asked, session=f"{number}", cache_salt=f"{number} {turn % 7}")
                assert answer.token_ids == expected[asked]
                client.session(f"{number}", "save", cache_salt=f"{number} {turn % 7}")
        place.check()
    assert found > 0
    with place.serve() as (_, client):
        answers_are_right(client, expected)
    assert place.check() > 0
