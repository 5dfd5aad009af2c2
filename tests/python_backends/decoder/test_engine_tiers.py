"""The engine with a KV cache over all tiers: answers are those without one, wherever entries lie or move meanwhile."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest

from python_backends.kv.mover import Mover
from tests.python_backends.decoder.cached_engines import (
    PLAIN,
    cached,
    engines,
    keys_of,
    load_behind_a_gate,
    missed,
    send_down,
    settle,
    until,
)
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


class SlowDisk:
    """A prompt of 400 tokens on a disk that takes as long as computing it would; its first reads wait for `begin`."""

    def __init__(self, open_engine):
        self.engine, self.cache = open_engine(folder="slow", mover=Mover)
        self.ids = prompt(15, 400)
        self.answer = alone(self.engine, self.ids, max_tokens=8)
        send_down(self.engine, self.cache, "host", "nvme")
        self.computed_before = self.engine.stats.read()["prefill_tokens"]
        held = sum(key.num_bytes for key in keys_of(self.cache))
        seconds = len(self.ids) * self.engine._budget.token_s
        self.cache.speeds.record(("nvme", "host"), 2**40, 2**40 / held * seconds)
        self.begin = threading.Event()
        store = self.cache._stores["nvme"]
        read_many = store.read_many

        def read_later(items):
            assert self.begin.wait(20)
            return read_many(items)

        store.read_many = read_later

    @property
    def computed(self):
        return self.engine.stats.read()["prefill_tokens"] - self.computed_before

    def ask(self, loaded_in_chunk_at=None, **parameters):
        """Loading ends in the chunk at whose first or last token (from, to) the function says so."""
        caller = Caller(self.ids, **parameters)
        caller.request.hit = hit = self.engine.look_up(caller.request)
        assert 0 < hit.meets_at < 399
        assert hit.loading
        step = self.engine._runtime.step

        def step_then_loaded(inputs, **options):
            start = int(inputs.past_len.max())
            if loaded_in_chunk_at and loaded_in_chunk_at(hit.meets_at, start, start + int(inputs.query_len.max())):
                self.begin.set()
                assert not hit.when_loaded(over.set) or over.wait(20)
            return step(inputs, **options)

        over = threading.Event()
        self.engine._runtime.step = step_then_loaded
        return caller.to(self.engine), hit.meets_at


@pytest.mark.parametrize("late", [False, True], ids=["in-time", "a-chunk-late"])
def test_what_a_slow_disk_holds_is_computed_from_the_front_while_its_end_is_loaded(open_engine, late):
    disk = SlowDisk(open_engine)

    def now(meets_at, start, end):
        return start == meets_at if late else end == meets_at

    caller, met = disk.ask(now)
    met += late * PLAIN.prefill_chunk
    assert caller.wait().tokens == disk.answer.tokens
    np.testing.assert_array_equal(caller.pieces[0].logprobs, disk.answer.pieces[0].logprobs)
    assert (cached(caller, "nvme"), missed(caller)) == (399 - met, "slow")
    assert disk.computed == met + 1
    settle(disk.engine)
    again = alone(disk.engine, disk.ids)
    assert (again.tokens, cached(again, "nvme")) == (disk.answer.tokens, 0), "both ends are in memory now"


def test_answers_that_share_a_prompt_go_on_where_its_two_ends_met(open_engine):
    disk = SlowDisk(open_engine)
    sampling = {"temperature": 1.2, "n": 3, "seed": 9, "max_tokens": 8}
    caller, met = disk.ask(lambda meets_at, start, end: end == meets_at, **sampling)
    caller.wait()
    assert disk.computed == met + 3
    wanted = alone(open_engine(cached=False)[0], disk.ids, **sampling)
    assert [caller.tokens_of(index) for index in range(3)] == [wanted.tokens_of(index) for index in range(3)]


def test_where_two_ends_meet_the_later_one_may_still_be_on_its_way_into_the_slot(open_engine, monkeypatch):
    disk = SlowDisk(open_engine)
    gate = load_behind_a_gate(disk.engine, monkeypatch)
    caller, met = disk.ask(lambda meets_at, start, end: end == meets_at)
    until(lambda: 399 in [disk.engine._scheduler.place(each)[1] for each in disk.engine._scheduler.running])
    time.sleep(0.05)
    assert (disk.computed, caller.pieces) == (met, [])
    gate.opened.set()
    assert caller.wait().tokens == disk.answer.tokens
    assert disk.computed == met + 1


def test_a_disk_that_is_even_slower_is_overtaken(open_engine):
    disk = SlowDisk(open_engine)
    caller, _ = disk.ask()
    assert caller.wait().tokens == disk.answer.tokens
    assert (disk.computed, cached(caller, "nvme"), missed(caller)) == (400, 0, "slow")
    disk.begin.set()


def test_an_end_that_is_lost_is_computed_too(open_engine):
    disk = SlowDisk(open_engine)
    for key in keys_of(disk.cache):
        if key.kind == "tail":
            disk.cache._stores["nvme"].drop(key)
    caller, _ = disk.ask(lambda meets_at, start, end: end == meets_at)
    assert caller.wait().tokens == disk.answer.tokens
    assert (disk.computed, cached(caller, "nvme"), missed(caller)) == (400, 0, "lost")


def test_a_request_cancelled_before_its_two_ends_meet_releases_both(open_engine):
    disk = SlowDisk(open_engine)
    caller, _ = disk.ask()
    caller.cancelled = True
    assert caller.wait().last.finish_reason in ("cancelled", "length")
    disk.begin.set()


def test_beside_other_requests_everything_is_loaded(open_engine):
    disk = SlowDisk(open_engine)
    busy = Caller(prompt(16, 10), max_tokens=100).to(disk.engine)
    hit = disk.engine.look_up(Caller(disk.ids).request)
    assert (hit.meets_at, hit.length) == (0, 399)
    disk.begin.set()
    hit.release()
    busy.wait()
