"""Load as it reaches whatever answers: a target of threads that notes what it was asked."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import pytest

from client.bench.load import Job, Trace, closed_loop, intrude, open_loop, together
from python_backends.errors import ServerUnavailableError

JOB = Job((1, 2, 3), "", 3)


class Notes:
    """Gives a token every few milliseconds once it has ``first`` jobs, and notes how many it had at once."""

    name = "notes"

    def __init__(self, every_s: float = 0.002, fail: bool = False, first: int = 1) -> None:
        self._every_s, self._fail = every_s, fail
        self._first, self._begun = first, threading.Event()
        self._lock = threading.Lock()
        self.now = self.most = 0
        self.submitted: list[float] = []

    def submit(self, job: Job, trace: Trace, done: Callable[[], None]) -> None:
        self.submitted.append(time.perf_counter())
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        if len(self.submitted) >= self._first:
            self._begun.set()
        threading.Thread(target=self._answer, args=(job, trace, done)).start()

    def _answer(self, job: Job, trace: Trace, done: Callable[[], None]) -> None:
        self._begun.wait(10)
        for _ in range(0 if self._fail else job.max_tokens):
            time.sleep(self._every_s)
            trace.add(1)
        with self._lock:
            self.now -= 1
        trace.end("broken" if self._fail else "")
        done()


def test_a_batch_is_asked_at_once_and_waited_for() -> None:
    target = Notes(first=5)
    traces = together(target, [JOB] * 5)
    assert target.most == 5
    assert all(len(trace.stamps) == 3 and trace.ended_s >= trace.stamps[-1] for trace in traces)


def test_a_closed_loop_never_has_more_in_flight_than_its_concurrency() -> None:
    target = Notes(first=3)
    traces = closed_loop(target, itertools.repeat(JOB), concurrency=3, requests=10)
    assert len(traces) == 10
    assert target.most == 3
    assert target.now == 0


def test_open_loop_clocks_start_at_the_arrival_that_was_drawn() -> None:
    one, two = (open_loop(Notes(), itertools.repeat(JOB), 400.0, 12, seed) for seed in (5, 5))
    spans = [[trace.arrival_s - traces[0].arrival_s for trace in traces] for traces in (one, two)]
    assert spans[0] == pytest.approx(spans[1], abs=1e-6)
    assert spans[0] == sorted(spans[0])
    assert spans[0][-1] > 0


def test_an_open_loop_does_not_wait_for_answers() -> None:
    target = Notes(every_s=0.05, first=4)
    open_loop(target, itertools.repeat(JOB), 1000.0, 8, 0)
    assert target.most > 3


def test_the_long_prompt_comes_when_all_others_decode() -> None:
    found = intrude(Notes(), [Job((1,), "", 20)] * 3, JOB, after_tokens=5)
    assert all(trace.stamps[4] <= found.long.arrival_s for trace in found.decoding)
    assert len(found.long.stamps) == 3


def test_a_failure_before_the_long_prompt_does_not_hang() -> None:
    found = intrude(Notes(fail=True), [JOB], JOB, after_tokens=5)
    assert found.decoding[0].error == "broken"


def test_a_target_that_never_answers_is_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.bench.load.WAIT_S", 0.01)

    class Silent:
        name = "silent"

        def submit(self, job: Job, trace: Trace, done: Callable[[], None]) -> None:
            del job, trace, done

    with pytest.raises(ServerUnavailableError, match="silent"):
        together(Silent(), [JOB])
