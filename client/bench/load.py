"""Offering load to whatever answers, and writing down when each token came.

Three ways: a batch that begins together, closed-loop concurrency (who has its answer asks again), and open-loop Poisson
arrivals. In the open loop a request's clock starts when it was to arrive, so that a server that falls behind cannot
hide it.
"""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from python_backends.errors import ServerUnavailableError

WAIT_S = 600.0
"""Without a token for so long, whatever answers is taken for dead."""


@dataclass(frozen=True)
class Job:
    """One request: greedy, without an end before ``max_tokens``."""

    input_ids: tuple[int, ...]
    text: str
    """What the tokenizer makes ``input_ids`` of; empty where only ids are needed."""
    max_tokens: int


@dataclass
class Trace:
    """When one answer's tokens came, in seconds of `time.perf_counter`."""

    arrival_s: float
    stamps: list[float] = field(default_factory=list)
    """One per token; tokens that came together have the same."""
    ended_s: float = 0.0
    error: str = ""

    def add(self, tokens: int) -> None:
        """So many tokens came just now."""
        self.stamps += [time.perf_counter()] * tokens

    def end(self, error: str = "") -> None:
        """The answer is complete, or has failed."""
        self.ended_s, self.error = time.perf_counter(), error


class Target(Protocol):
    """Answers jobs."""

    name: str

    def submit(self, job: Job, trace: Trace, done: Callable[[], None]) -> None:
        """Begin to answer and return at once. ``done`` is called from any thread when the trace has ended."""
        ...

    def stats(self) -> Mapping[str, float]:
        """Totals of the engine's steps (`Stats.read`)."""
        ...


class _Running:
    """Jobs in flight and the traces of those that ended."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._ended: queue.SimpleQueue[Trace] = queue.SimpleQueue()
        self.in_flight = 0

    def submit(self, job: Job, arrival_s: float | None = None) -> Trace:
        trace = Trace(time.perf_counter() if arrival_s is None else arrival_s)
        self.in_flight += 1
        self._target.submit(job, trace, lambda: self._ended.put(trace))
        return trace

    def wait(self) -> Trace:
        """The next that ends.

        Raises:
            ServerUnavailableError: none does.
        """
        try:
            trace = self._ended.get(timeout=WAIT_S)
        except queue.Empty:
            raise ServerUnavailableError(f"{self._target.name} gave no answer for {WAIT_S:.0f} s") from None
        self.in_flight -= 1
        return trace

    def drain(self) -> None:
        while self.in_flight:
            self.wait()


def together(target: Target, jobs: Sequence[Job]) -> list[Trace]:
    """All at once; returns when all have ended."""
    running = _Running(target)
    traces = [running.submit(job) for job in jobs]
    running.drain()
    return traces


def closed_loop(target: Target, jobs: Iterator[Job], concurrency: int, requests: int) -> list[Trace]:
    """``concurrency`` callers, each asking again as soon as it has its answer, until ``requests`` were made."""
    running = _Running(target)
    traces = [running.submit(next(jobs)) for _ in range(min(concurrency, requests))]
    while len(traces) < requests:
        running.wait()
        traces.append(running.submit(next(jobs)))
    running.drain()
    return traces


def open_loop(target: Target, jobs: Iterator[Job], rate: float, requests: int, seed: int) -> list[Trace]:
    """Poisson arrivals, ``rate`` a second on average, whatever became of those before."""
    rng = random.Random(seed)
    running = _Running(target)
    arrival, traces = time.perf_counter(), []
    for _ in range(requests):
        arrival += rng.expovariate(rate)
        time.sleep(max(0.0, arrival - time.perf_counter()))
        traces.append(running.submit(next(jobs), arrival))
    running.drain()
    return traces


@dataclass(frozen=True)
class Intrusion:
    """A long prompt that arrived while others decoded."""

    decoding: list[Trace]
    long: Trace


def intrude(target: Target, decoding: Sequence[Job], long: Job, after_tokens: int) -> Intrusion:
    """Submit ``long`` once every one of ``decoding`` has ``after_tokens`` tokens."""
    running = _Running(target)
    traces = [running.submit(job) for job in decoding]
    begin = time.perf_counter()
    while any(len(trace.stamps) < after_tokens and not trace.ended_s for trace in traces):
        if time.perf_counter() - begin > WAIT_S:
            raise ServerUnavailableError(f"{target.name} gave no tokens for {WAIT_S:.0f} s")
        time.sleep(0.005)
    late = running.submit(long)
    running.drain()
    return Intrusion(traces, late)
