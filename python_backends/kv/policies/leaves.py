"""Policies that are a score: the leaves of the tier in a heap, the lowest score leaves first."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable

from python_backends.errors import InternalError
from python_backends.kv.policies.base import BlockStats

Score = tuple[float, ...]


class Leaves:
    """Which leaves must be scored before the next victim and which have a place in a heap.

    An entry costs a dictionary operation when it comes, goes or is used; a heap operation only when it may be evicted.
    Every leaf is in `_fresh` (to be scored) or in `_scored` (its place in the heap by sequence number), never in both;
    heap items whose number is not the entry's are stale and skipped.
    """

    def __init__(self) -> None:
        self._fresh: dict[BlockStats, None] = {}
        self._scored: dict[BlockStats, int] = {}
        self._sequence = 0

    def on_insert(self, entry: BlockStats, now: float) -> None:
        """See `Policy`."""
        self._fresh[entry] = None

    def on_access(self, entry: BlockStats, now: float) -> None:
        """See `Policy`."""
        if self._scored.pop(entry, None) is not None:
            self._fresh[entry] = None

    def on_remove(self, entry: BlockStats, now: float, *, evicted: bool) -> None:
        """See `Policy`."""
        self.on_shield(entry)

    def on_shield(self, entry: BlockStats) -> None:
        """See `Policy`."""
        if self._scored.pop(entry, None) is None:
            self._fresh.pop(entry, None)

    def on_expose(self, entry: BlockStats, now: float) -> None:
        """See `Policy`."""
        self._fresh[entry] = None

    def _check(self, name: str, leaves: set[BlockStats], heap: Iterable[tuple[int, BlockStats]]) -> None:
        """Raise InternalError where the leaves or the numbers in the heap are not those there should be."""
        if self._fresh.keys() | self._scored.keys() != leaves or self._fresh.keys() & self._scored.keys():
            raise InternalError(f"{name}: {len(self._fresh)} + {len(self._scored)} leaves, {len(leaves)} in the tier")
        live = [number for number, entry in heap if self._scored.get(entry) == number]
        if sorted(live) != sorted(self._scored.values()):
            raise InternalError(f"{name}: {len(self._scored)} scored leaves, {len(live)} in the heap")


class LeafHeap(Leaves, ABC):
    """Keeps leaves by `score`, which is asked for when a victim is wanted and the leaf changed since."""

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[Score, int, BlockStats]] = []

    @property
    @abstractmethod
    def name(self) -> str:
        """As in the configuration."""

    @abstractmethod
    def score(self, entry: BlockStats, now: float) -> Score:
        """The lowest leaves first. May only change by an access, or where the policy asks for `rescore`."""

    def rank(self, entry: BlockStats, now: float) -> Score:
        """See `Policy`."""
        return self.score(entry, now)

    def rescore(self) -> None:
        """Ask for every score anew, before the next victim."""
        self._fresh.update(dict.fromkeys(self._scored))
        self._scored.clear()
        self._heap.clear()

    def victims(self, now: float) -> Generator[BlockStats]:
        """See `Policy`."""
        kept: list[tuple[Score, int, BlockStats]] = []
        heap, scored = self._heap, self._scored
        try:
            while True:
                self._score_fresh(now)
                if not heap:
                    return
                item = heapq.heappop(heap)
                if scored.get(item[2]) == item[1]:
                    kept.append(item)
                    yield item[2]
        finally:
            for item in kept:
                if scored.get(item[2]) == item[1]:
                    heapq.heappush(heap, item)

    def _score_fresh(self, now: float) -> None:
        heap, scored = self._heap, self._scored
        for entry in self._fresh:
            self._sequence += 1
            scored[entry] = self._sequence
            heapq.heappush(heap, (self.score(entry, now), self._sequence, entry))
        self._fresh.clear()

    def check_integrity(self, entries: set[BlockStats], leaves: set[BlockStats]) -> None:
        """See `Policy`."""
        self._check(self.name, leaves, ((number, entry) for _, number, entry in self._heap))


class LRU(LeafHeap):
    """Least recently used first; of one request's entries the deepest first."""

    name = "lru"

    def score(self, entry: BlockStats, now: float) -> Score:
        """Time of the newest use."""
        return (entry.visit.time, -entry.key.position)


class LFU(LeafHeap):
    """Least frequently used first, then least recently. Counts survive as long as the manager remembers the entry."""

    name = "lfu"

    def score(self, entry: BlockStats, now: float) -> Score:
        """Uses, then time of the newest."""
        return (entry.uses, entry.visit.time, -entry.key.position)
