"""The engine with a KV cache over all tiers: answers are those without one, wherever entries lie or move meanwhile."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from python_backends.kv.mover import Mover
from tests.python_backends.decoder.cached_engines import PLAIN, cached, engines, send_down
from tests.python_backends.decoder.callers import Caller, alone, prompt
from tests.python_backends.kv.caches import MB


@pytest.fixture
def open_engine(tmp_path):
    with engines(tmp_path) as open_:
        yield open_


@pytest.mark.parametrize("mover", [None, Mover], ids=["at-once", "threads"])
@pytest.mark.parametrize("source", ["host", "nvme"])
def test_answers_from_lower_tiers_are_the_same(open_engine, source, mover):
    plain, _ = open_engine(cached=False)
    engine, cache = open_engine(folder="tier", mover=mover)
    ids = prompt(7, 120)
    first = alone(engine, ids)
    send_down(engine, cache, *(("host", "nvme") if source == "nvme" else ("host",)))
    again = alone(engine, ids)
    assert again.tokens == first.tokens == alone(plain, ids).tokens
    assert cached(again, source) == 119


def test_a_restarted_server_goes_on_from_disk(open_engine):
    ids = prompt(8, 120)
    engine, cache = open_engine(folder="kept")
    first = alone(engine, ids)
    send_down(engine, cache, "host", "nvme")
    engine.close()
    again = alone(open_engine(folder="kept")[0], ids)
    assert (again.tokens, cached(again, "nvme")) == (first.tokens, 119)


def test_many_requests_at_once_over_tiers_that_move_answer_as_alone(open_engine):
    plain, _ = open_engine(cached=False)
    engine, cache = open_engine(
        folder="crowd",
        config=dataclasses.replace(PLAIN, quantum_tokens=4, max_draft=2),
        device=MB // 8,
        host=MB // 8,
        nvme=8 * MB,
        mover=Mover,
    )
    systems = [prompt(30 + index, 40) for index in range(3)]
    cases = [[*systems[seed % 3], *prompt(40 + seed % 7, 10 + seed % 5)] for seed in range(30)]
    expected = {tuple(ids): alone(plain, ids, max_tokens=6).tokens for ids in cases}
    callers = []
    for number, ids in enumerate(cases):
        callers.append(Caller(ids, max_tokens=6).to(engine))
        if number % 6 == 5:
            gone = Caller(ids, max_tokens=100).to(engine)
            time.sleep(0.01)
            gone.cancelled = True
            engine.check_integrity()
    assert [caller.wait().tokens for caller in callers] == [expected[tuple(ids)] for ids in cases]
    assert sum(sum(caller.last.usage.as_json()["cached_tokens"].values()) for caller in callers) > 0
    assert cache.stats()["tiers"]["host"]["writes"]


@pytest.mark.parametrize("mover", [None, Mover], ids=["at-once", "threads"])
def test_tiers_of_a_few_entries_that_must_move_all_the_time_change_no_answer(open_engine, mover):
    plain, _ = open_engine(cached=False)
    engine, cache = open_engine(folder="small", device=MB // 8, host=MB // 8, nvme=8 * MB, mover=mover)
    rng = np.random.default_rng(5)
    histories = [prompt(20 + index, 60) for index in range(4)]
    for _ in range(24):
        index = int(rng.integers(len(histories)))
        ids = histories[index]
        found = alone(engine, ids, max_tokens=8)
        assert found.tokens == alone(plain, ids, max_tokens=8).tokens
        histories[index] = [*ids, *found.tokens, *prompt(int(rng.integers(1000)), 6)]
        if len(histories[index]) > 200:
            histories[index] = histories[index][:60]
        cache.check_integrity()
    tiers = cache.stats()["tiers"]
    assert tiers["host"]["writes"] > 10
    assert tiers["nvme"]["writes"] > 10
