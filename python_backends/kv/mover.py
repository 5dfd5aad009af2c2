"""Copies payloads between tiers on threads of its own, with a deadline for each.

Three lanes, so that none waits for what another is about: reads from NVMe, writes to it, and copies in memory. A lane's
queue is bounded and ordered by priority; moves over the same link go in one batch, so that the disk sees large
transfers. A transfer that does not end in time is a failure at its deadline, whatever the system call does: its thread
is written off and another takes its place, up to a number after which the lane refuses moves until one comes back.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import cast

from python_backends.errors import EntryLostError, InternalError, TierError, TierFullError, TierIoError
from python_backends.kv.blocks import Move, Tier
from python_backends.kv.costs import LinkSpeeds
from python_backends.kv.tiers.base import MemoryStore, TierStore

BATCH_BYTES = 16 * 2**20
CLOSE_S = 5.0


@dataclass(eq=False, slots=True)
class _Job:
    move: Move
    target: Tier
    priority: int
    due: float
    future: Future[None] = field(default_factory=Future)
    worker: _Worker | None = None
    settled: bool = False


@dataclass(eq=False, slots=True)
class _Worker:
    lane: _Lane
    jobs: list[_Job] = field(default_factory=list)
    written_off: bool = False


@dataclass(eq=False, slots=True)
class _Lane:
    """Invariants: ``working`` counts the workers not written off, ``stuck`` the written-off ones still away."""

    name: str
    threads: int
    queue: list[tuple[int, int, _Job]] = field(default_factory=list)
    working: int = 0
    stuck: int = 0
    moves: int = 0
    moved_bytes: int = 0
    failures: dict[str, int] = field(default_factory=dict)

    def fail(self, reason: str) -> None:
        self.failures[reason] = self.failures.get(reason, 0) + 1


class Mover:
    """See the module.

    Args:
        stores: by tier; those but "nvme" are `MemoryStore`.
        queue_limit: moves that may wait in one lane.
        readers, writers, copiers: threads of the lanes.
        most_stuck: threads that may hang in one lane before it refuses moves.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        stores: Mapping[Tier, TierStore],
        *,
        queue_limit: int = 16_384,
        readers: int = 2,
        writers: int = 1,
        copiers: int = 1,
        most_stuck: int = 4,
    ) -> None:
        self.speeds = LinkSpeeds()
        self._stores = dict(stores)
        self._queue_limit = queue_limit
        self._most_stuck = most_stuck
        self._lanes = {
            lane.name: lane for lane in (_Lane("read", readers), _Lane("write", writers), _Lane("memory", copiers))
        }
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._open_jobs: set[_Job] = set()
        self._busy = 0
        self._closed = False
        with self._changed:
            for lane in self._lanes.values():
                self._fill_lane(lane)
        threading.Thread(target=self._watch, name="kv-deadlines", daemon=True).start()

    # -- asking ------------------------------------------------------------------------------------------------------
    def submit(self, move: Move, *, priority: int = 0, deadline_s: float = 30.0) -> Future[None]:
        """Copy a payload from ``move.source`` to ``move.target``; low ``priority`` numbers go first.

        The future fails with TierFullError (no room at the target, or "queue"), EntryLostError (the source does not
        hold it any more; "late" where reading it did not end in time, and it was dropped), or TierIoError ("io",
        "late", "paused", "hung", "closed"). `Future.cancel` works until the transfer begins. Raises InternalError for
        a move without a target.
        """
        if move.target is None:
            raise InternalError("a move without a target is a drop, not a copy")
        job = _Job(move, move.target, priority, time.monotonic() + deadline_s)
        lane = self._lanes["read" if move.source == "nvme" else "write" if move.target == "nvme" else "memory"]
        refused: list[tuple[_Job, TierError]] = []
        with self._changed:
            if self._closed:
                refused.append((job, TierIoError("the KV cache is closing", "closed")))
            elif lane.stuck >= self._most_stuck:
                refused.append((job, TierIoError(f"{lane.stuck} transfers hang; no more are begun", "hung")))
            else:
                heapq.heappush(lane.queue, (priority, next(self._numbers), job))
                self._open_jobs.add(job)
                if len(lane.queue) > self._queue_limit:
                    last = max(lane.queue)
                    lane.queue.remove(last)
                    heapq.heapify(lane.queue)
                    refused.append((last[2], TierFullError("too many transfers wait", "queue")))
                self._changed.notify_all()
            for _, error in refused:
                lane.fail(error.reason)
        for other, error in refused:
            self._settle(other, error)
        return job.future

    def stats(self) -> dict[str, object]:
        """By lane: waiting, moves and bytes done, hanging threads, failures; bandwidth by link. JSON-ready."""
        with self._changed:
            lanes = {
                lane.name: {
                    "waiting": len(lane.queue),
                    "moves": lane.moves,
                    "moved_bytes": lane.moved_bytes,
                    "stuck": lane.stuck,
                    "failures": dict(lane.failures),
                }
                for lane in self._lanes.values()
            }
        return {"lanes": lanes, "bytes_per_s": self.speeds.as_dict()}

    def close(self) -> None:
        """Cancel what waits and let what is under way end, for a few seconds at most."""
        with self._changed:
            self._closed = True
            waiting = [job for lane in self._lanes.values() for _, _, job in lane.queue]
            for lane in self._lanes.values():
                lane.queue.clear()
            self._changed.notify_all()
        for job in waiting:
            self._settle(job, TierIoError("the KV cache is closing", "closed"))
        with self._changed:
            self._changed.wait_for(lambda: self._busy == 0, CLOSE_S)
            left = list(self._open_jobs)
        for job in left:
            self._give_up(job, "closed")

    # -- working -----------------------------------------------------------------------------------------------------
    def _fill_lane(self, lane: _Lane) -> None:
        """Start workers where some are missing, unless too many hang. Under the lock."""
        while lane.working < lane.threads and lane.stuck <= self._most_stuck and not self._closed:
            lane.working += 1
            threading.Thread(target=self._work, args=(_Worker(lane),), name=f"kv-{lane.name}", daemon=True).start()

    def _work(self, worker: _Worker) -> None:
        while not worker.written_off:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or worker.lane.queue)
                if self._closed:
                    return
                worker.jobs = self._take_batch(worker)
                if not worker.jobs:
                    continue
                self._busy += 1
            self._carry_out(worker.jobs)
            with self._changed:
                worker.jobs = []
                if worker.written_off:
                    worker.lane.stuck -= 1
                    self._fill_lane(worker.lane)
                else:
                    self._busy -= 1
                self._changed.notify_all()

    def _take_batch(self, worker: _Worker) -> list[_Job]:
        """The next job, and those behind it that go over the same link with the same priority. Under the lock."""
        queue = worker.lane.queue
        jobs: list[_Job] = []
        taken = 0
        while queue and taken < BATCH_BYTES:
            job = queue[0][2]
            same = not jobs or (job.move.source, job.target, job.priority) == (
                jobs[0].move.source, jobs[0].target, jobs[0].priority,
            )  # fmt: skip
            if not same:
                break
            heapq.heappop(queue)
            if not job.settled and job.future.set_running_or_notify_cancel():
                job.worker = worker
                jobs.append(job)
                taken += job.move.key.num_bytes
            elif not job.settled:
                job.settled = True
                self._open_jobs.discard(job)
                worker.lane.fail("cancelled")
        return jobs

    def _carry_out(self, jobs: list[_Job]) -> None:
        began = time.monotonic()
        try:
            results = self._load(jobs) if jobs[0].move.source == "nvme" else self._store(jobs)
        except Exception as error:
            # A fault of ours; the futures carry it to where it is logged.
            for job in jobs:
                self._settle(job, error)
            return
        seconds = time.monotonic() - began
        # One that was given up hung: what it took says nothing about the next.
        moved = [job for job, outcome in zip(jobs, results, strict=True) if outcome is None and not job.settled]
        if moved:
            link = (jobs[0].move.source, jobs[0].target)
            self.speeds.record(link, sum(job.move.key.num_bytes for job in moved), seconds)
        for job, outcome in zip(jobs, results, strict=True):
            if self._settle(job, outcome) or outcome is not None:
                continue
            # It arrived after it had been given up: nobody knows of it.
            if job.target == "nvme":
                self._stores[job.target].drop(job.move.key)

    def _store(self, jobs: list[_Job]) -> list[TierError | None]:
        """From memory to any tier."""
        source = cast("MemoryStore", self._stores[jobs[0].move.source])
        results: list[TierError | None] = [None] * len(jobs)
        with ExitStack() as stack:
            items, places = [], []
            for at, job in enumerate(jobs):
                try:
                    items.append((job.move.key, stack.enter_context(source.view(job.move.key))))
                    places.append(at)
                except EntryLostError as error:
                    results[at] = error
            found = self._stores[jobs[0].target].write_many(items)
        for place, failure in zip(places, found, strict=True):
            results[place] = failure
        return results

    def _load(self, jobs: list[_Job]) -> list[TierError | None]:
        """From NVMe into memory, straight to its place there."""
        target = cast("MemoryStore", self._stores[jobs[0].target])
        source = self._stores[jobs[0].move.source]
        results: list[TierError | None] = [None] * len(jobs)
        fills: list[tuple[int, AbstractContextManager[memoryview], memoryview]] = []
        for at, job in enumerate(jobs):
            fill = target.fill(job.move.key)
            try:
                fills.append((at, fill, fill.__enter__()))
            except TierError as error:
                results[at] = error
        failures: Sequence[EntryLostError | None] = [EntryLostError("the read did not end", "io")] * len(fills)
        try:
            failures = source.read_many([(jobs[at].move.key, room) for at, _, room in fills])
        finally:
            for (at, fill, _), failure in zip(fills, failures, strict=True):
                results[at] = failure
                if failure is None:
                    fill.__exit__(None, None, None)
                    continue
                fill.__exit__(type(failure), failure, None)
                if failure.reason in ("paused", "closed"):  # the entry itself is well: not lost
                    results[at] = TierIoError(failure.message, failure.reason)
        return results

    # -- ending ------------------------------------------------------------------------------------------------------
    def _settle(self, job: _Job, error: Exception | None) -> bool:
        """End a job, once; False where it had ended. The future's callbacks run here, without the lock."""
        with self._changed:
            if job.settled:
                return False
            job.settled = True
            self._open_jobs.discard(job)
            if job.worker is not None:
                lane = job.worker.lane
                if error is None:
                    lane.moves += 1
                    lane.moved_bytes += job.move.key.num_bytes
                else:
                    lane.fail(error.reason if isinstance(error, TierError) else "unexpected")
        if job.future.cancelled() or (job.worker is None and not job.future.set_running_or_notify_cancel()):
            return True
        if error is None:
            job.future.set_result(None)
        else:
            job.future.set_exception(error)
        return True

    def _watch(self) -> None:
        """Give up on jobs at their deadlines."""
        while True:
            with self._changed:
                if self._closed:
                    return
                due = min((job.due for job in self._open_jobs), default=None)
                now = time.monotonic()
                if due is None or due > now:
                    self._changed.wait(None if due is None else due - now)
                    continue
                late = [job for job in self._open_jobs if job.due <= now]
            for job in late:
                self._give_up(job, "late")

    def _give_up(self, job: _Job, reason: str) -> None:
        worker = job.worker
        name = f"{job.move.source} to {job.target}"
        error: TierError = TierIoError(f"a transfer from {name} did not end in time", reason)
        if worker is not None and reason == "late" and job.move.source == "nvme":
            error = EntryLostError(f"a transfer from {name} did not end in time", reason)
        if not self._settle(job, error):
            return
        if worker is None:
            return
        if job.move.source == "nvme":
            cast("MemoryStore", self._stores[job.target]).disown(job.move.key)
            if reason == "late":
                # Reading it hung once and would again; what is forgotten can be computed.
                self._stores["nvme"].drop(job.move.key)
        self._write_off(worker)

    def _write_off(self, worker: _Worker) -> None:
        with self._changed:
            if worker.written_off or not worker.jobs:
                return
            worker.written_off = True
            worker.lane.working -= 1
            worker.lane.stuck += 1
            self._busy -= 1
            self._fill_lane(worker.lane)
            self._changed.notify_all()
