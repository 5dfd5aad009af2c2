"""A²CR, attention-aware cache replacement: keep what is worth most per byte and second.

    worth = best rate of reuse (learned, `reuse`) × seconds saved by a reuse ÷ bytes × attention

The published form scores by attention mass, decayed by ``exp(−decay · seconds since use)``, combined with reuse
frequency and recompute cost. Here reuse and its decay are learned from the requests; attention is one factor,
``mass ^ (exponent · exp(−decay · seconds since use))``, neutral (1) where no mass was measured and for a block that got
as much as the mean of its prompt.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator

from python_backends.kv.policies.base import BlockStats
from python_backends.kv.policies.leaves import Leaves
from python_backends.kv.policies.reuse import BINS, EDGES, ReuseModel, age_bin

_EDGES: list[float] = EDGES.tolist()
MASS_EXPONENT = 0.5
MIN_MASS, MAX_MASS = 1 / 16, 16.0
"""Where the evidence of attention ends."""

Item = tuple[float, int, float, int, BlockStats]
"""Worth, minus position, time of the newest visit, number, entry."""


class A2CR(Leaves):
    """See the module. Leaves lie in a heap by worth, which changes only when an entry's age passes into the next bin of
    the model, when it is used, or when the model has learned; a second heap tells when the first happens.
    """

    name = "a2cr"

    def __init__(self, reuse: ReuseModel, decay_factor: float) -> None:
        super().__init__()
        self._reuse = reuse
        self._decay = decay_factor
        self._fits = reuse.fits
        self._heap: list[Item] = []
        self._changes: list[tuple[float, int, BlockStats]] = []
        self._exposed: BlockStats | None = None
        """The newest leaf by `on_expose`."""

    def worth(self, entry: BlockStats, now: float) -> float:
        """Seconds saved per byte and second."""
        age = now - entry.visit.time
        worth = self._reuse.rates(entry)[age_bin(age)] * (entry.recompute_s or 1.0) / max(1, entry.key.num_bytes)
        if entry.mass is not None:
            mass = min(max(entry.mass, MIN_MASS), MAX_MASS)
            worth *= mass ** (MASS_EXPONENT * math.exp(-self._decay * age))
        return worth

    def rank(self, entry: BlockStats, now: float) -> tuple[float, ...]:
        """See `Policy`."""
        return (self.worth(entry, now), -entry.key.position)

    def on_expose(self, entry: BlockStats, now: float) -> None:
        """See `Policy`."""
        super().on_expose(entry, now)
        self._exposed = entry

    def victims(self, now: float) -> Generator[BlockStats]:
        """See `Policy`."""
        self._bring_up(now)
        scored, heap = self._scored, self._heap
        kept: list[Item] = []
        try:
            while True:
                if self._fresh:
                    self._score_fresh(now)
                if not heap:
                    return
                item = heapq.heappop(heap)
                if scored.get(item[4]) == item[3]:
                    kept.append(item)
                    yield item[4]
                    yield from self._run_above(item[4])
        finally:
            for item in kept:
                if scored.get(item[4]) == item[3]:
                    heapq.heappush(heap, item)

    def _run_above(self, entry: BlockStats) -> Generator[BlockStats]:
        """What the removal of a victim exposed, if it is as old and of the same class: its worth is not above the
        victim's, so it is next, and needs no place in the heaps."""
        while entry not in self._scored:
            above = self._exposed
            if above is None or above.visit is not entry.visit or above.uses != entry.uses or above.mass != entry.mass:
                return
            if entry.key.position == entry.visit.end or entry.key.kind == "tail" or above not in self._fresh:
                return
            yield above
            entry = above
            if above in self._fresh:  # not taken
                return

    def _bring_up(self, now: float) -> None:
        """Mark what must be scored anew."""
        scored, changes = self._scored, self._changes
        if self._fits != self._reuse.fits or len(self._heap) > 4 * len(scored) + 64:
            self._fits = self._reuse.fits
            self._fresh.update(dict.fromkeys(scored))
            scored.clear()
            self._heap.clear()
            changes.clear()
        while changes and changes[0][0] <= now:
            _, number, entry = heapq.heappop(changes)
            if scored.get(entry) == number:
                del scored[entry]
                self._fresh[entry] = None

    def _score_fresh(self, now: float) -> None:
        for entry in self._fresh:
            self._sequence += 1
            number = self._scored[entry] = self._sequence
            time = entry.visit.time
            item = (self.worth(entry, now), -entry.key.position, time, number, entry)
            heapq.heappush(self._heap, item)
            following = age_bin(now - time) + 1
            if following < BINS:
                heapq.heappush(self._changes, (time + _EDGES[following], number, entry))
        self._fresh.clear()

    def check_integrity(self, entries: set[BlockStats], leaves: set[BlockStats]) -> None:
        """See `Policy`."""
        self._check(self.name, leaves, ((item[3], item[4]) for item in self._heap))
