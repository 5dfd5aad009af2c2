"""A²CR, attention-aware cache replacement: keep what is worth most per byte and second.

    worth = best rate of reuse (learned, `reuse`) × seconds saved by a reuse ÷ bytes × attention

The published form scores by attention mass, decayed by ``exp(−decay · seconds since use)``, combined with reuse
frequency and recompute cost. Here reuse and its decay are learned from the requests; attention is one factor,
``mass ^ (weight · exp(−decay · seconds since use))``, neutral (1) where no mass was measured and for a block that got
as much as the mean of its prompt, or for all where the weight is 0. While the model's guard says that LRU serves
better, worth is the time of the newest use.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator

import numpy as np

from python_backends.errors import InternalError
from python_backends.kv.policies.base import BlockStats
from python_backends.kv.policies.hazards import Float64, Int64
from python_backends.kv.policies.leaves import Leaves
from python_backends.kv.policies.reuse import ReuseModel

MIN_MASS, MAX_MASS = 1 / 16, 16.0
"""Where the evidence of attention ends."""
RANKED_SHARE = 1 / 16
"""Of the leaves, how many are ranked as the next victims at once."""
FEWEST_RANKED = 4
PLACE = (1 << 32) - 1
"""Bits of a leaf's number that are its place in the arrays; those above tell its stays there apart."""

Item = tuple[float, int, float, int, BlockStats]
"""Worth, minus position, time of the newest visit, number, entry."""


class A2CR(Leaves):
    """See the module. All leaves are scored at once, by arrays, and those worth least lie in a heap until it is empty;
    leaves that come meanwhile are scored as they come and join the heap where they are worth less than what was left
    out of it.
    """

    name = "a2cr"

    def __init__(self, reuse: ReuseModel, decay_factor: float = 0.0, attention_weight: float = 0.0) -> None:
        super().__init__()
        self._reuse = reuse
        self._decay = decay_factor
        self._weight = attention_weight
        self._state = (-1, True)
        """Of the model when the leaves got their rows: fits, trusted."""
        self._heap: list[Item] = []
        self._bar = -math.inf
        """Worth of what was left out of the heap is not below it."""
        self._ranked: tuple[tuple[object, ...], float] = ((), 0.0)
        """What `rank` was asked for last, and its worth."""
        self._exposed: BlockStats | None = None
        """The newest leaf by `on_expose`."""
        self._entries: list[BlockStats | None] = []
        self._free: list[int] = []
        self._rows = np.zeros(0, np.int64)
        self._times, self._values, self._log_masses = np.zeros(0), np.zeros(0), np.zeros(0)

    def worth(self, entry: BlockStats, now: float) -> float:
        """Seconds saved per byte and second."""
        (row,) = self._reuse.indices.rows([self._reuse.code(entry)])
        return self._worth(entry, row, now - entry.visit.time)

    def _worth(self, entry: BlockStats, row: int, age: float) -> float:
        worth = self._reuse.indices.at_one(row, age) * _value(entry)
        log_mass = self._log_mass(entry)
        return worth * math.exp(log_mass * math.exp(-self._decay * age)) if log_mass else worth

    def _log_mass(self, entry: BlockStats) -> float:
        """Logarithm of the attention factor right after a use."""
        if entry.mass is None or not self._weight:
            return 0.0
        return self._weight * math.log(min(max(entry.mass, MIN_MASS), MAX_MASS))

    def rank(self, entry: BlockStats, now: float) -> tuple[float, ...]:
        """See `Policy`. Entries of one visit are asked for in a row, and most of them are alike."""
        visit, key = entry.visit, entry.key
        if not self._trusts():
            return (visit.time, -key.position)
        alike = (visit, entry.life, key.position >= visit.end, entry.recompute_s, key.num_bytes, entry.mass, now)
        if alike != self._ranked[0]:
            self._ranked = (alike, self.worth(entry, now))
        return (self._ranked[1], -key.position)

    def _trusts(self) -> bool:
        return self._reuse.guard is None or self._reuse.guard.trusted

    def on_access(self, entry: BlockStats, now: float) -> None:
        """See `Policy`."""
        number = self._scored.pop(entry, None)
        if number is not None:
            self._give_up(number)
            self._fresh[entry] = None

    def on_shield(self, entry: BlockStats) -> None:
        """See `Policy`."""
        number = self._scored.pop(entry, None)
        if number is None:
            self._fresh.pop(entry, None)
        else:
            self._give_up(number)

    def on_expose(self, entry: BlockStats, now: float) -> None:
        """See `Policy`."""
        self._fresh[entry] = None
        self._exposed = entry

    def _give_up(self, number: int) -> None:
        self._entries[number & PLACE] = None
        self._free.append(number & PLACE)

    def victims(self, now: float) -> Generator[BlockStats]:
        """See `Policy`."""
        scored = self._scored
        kept: list[Item] = []
        given: set[BlockStats] = set()
        try:
            while True:
                self._bring_up(now)
                if not self._heap and not self._rank_leaves(now, given):
                    return
                item = heapq.heappop(self._heap)
                entry = item[4]
                if scored.get(entry) != item[3]:
                    continue
                kept.append(item)
                given.add(entry)
                yield entry
                yield from self._run_above(entry)
        finally:
            for item in kept:
                if scored.get(item[4]) == item[3]:
                    heapq.heappush(self._heap, item)

    def _run_above(self, entry: BlockStats) -> Generator[BlockStats]:
        """What the removal of a victim exposed, if it is as old and of the same class: its worth is not above the
        victim's, so it is next, and needs no place in the heap."""
        while entry not in self._scored:
            above = self._exposed
            if above is None or above.visit is not entry.visit or above.life != entry.life or above.mass != entry.mass:
                return
            if entry.key.position == entry.visit.end or entry.key.kind == "tail" or above not in self._fresh:
                return
            yield above
            entry = above
            if above in self._fresh:  # not taken
                return

    def _bring_up(self, now: float) -> None:
        """Score what came; score everything anew where the model has changed."""
        state = (self._reuse.fits, self._trusts())
        if state != self._state:
            self._state = state
            self._fresh.update(dict.fromkeys(self._scored))
            self._scored.clear()
            self._entries.clear()
            self._free.clear()
            self._heap.clear()
            self._bar = -math.inf
        if not self._fresh:
            return
        fresh = list(self._fresh)
        self._fresh.clear()
        for entry, row in zip(fresh, self._reuse.indices.rows(map(self._reuse.code, fresh)), strict=True):
            number = self._take_place(entry, row)
            time = entry.visit.time
            worth = self._worth(entry, row, now - time) if state[1] else time
            if worth < self._bar:
                heapq.heappush(self._heap, (worth, -entry.key.position, time, number, entry))

    def _take_place(self, entry: BlockStats, row: int) -> int:
        if self._free:
            place = self._free.pop()
            self._entries[place] = entry
        else:
            place = len(self._entries)
            self._entries.append(entry)
            if place >= len(self._rows):
                self._grow(2 * place + 256)
        self._sequence += 1
        number = self._scored[entry] = self._sequence << 32 | place
        self._rows[place] = row
        self._times[place] = entry.visit.time
        self._values[place] = _value(entry)
        if self._weight:
            self._log_masses[place] = self._log_mass(entry)
        return number

    def _grow(self, places: int) -> None:
        self._rows = np.resize(self._rows, places)
        self._times, self._values = np.resize(self._times, places), np.resize(self._values, places)
        self._log_masses = np.resize(self._log_masses, places)

    def _rank_leaves(self, now: float, given: set[BlockStats]) -> bool:
        """Fill the heap with the leaves that are worth least and were not given. False: there are none."""
        numbers = [number for entry, number in self._scored.items() if entry not in given]
        if not numbers:
            return False
        chosen = np.array(numbers)
        worth = self._worths(chosen & PLACE, now)
        count = max(FEWEST_RANKED, int(len(numbers) * RANKED_SHARE))
        self._bar = math.inf
        if count < len(numbers):
            order = np.argpartition(worth, count)
            self._bar = float(worth[order[count]])
            chosen, worth = chosen[order[:count]], worth[order[:count]]
        for number, value in zip(chosen.tolist(), worth.tolist(), strict=True):
            entry = self._entries[number & PLACE]
            assert entry is not None
            self._heap.append((value, -entry.key.position, entry.visit.time, number, entry))
        heapq.heapify(self._heap)
        return True

    def _worths(self, places: Int64, now: float) -> Float64:
        """[N] `worth` of leaves."""
        times = self._times[places]
        if not self._state[1]:
            return times
        ages = now - times
        worth = self._reuse.indices.at(self._rows[places], ages) * self._values[places]
        if self._weight:
            worth *= np.exp(self._log_masses[places] * np.exp(-self._decay * ages))
        return worth

    def check_integrity(self, entries: set[BlockStats], leaves: set[BlockStats]) -> None:
        """See `Policy`."""
        places = [(self._scored.get(entry, -1), entry) for entry in self._entries if entry is not None]
        self._check(self.name, leaves, places)
        if any(self._entries[number & PLACE] is not entry for entry, number in self._scored.items()):
            raise InternalError("a2cr: a leaf is not at its place")


def _value(entry: BlockStats) -> float:
    """Seconds saved by a reuse, per byte."""
    return (entry.recompute_s or 1.0) / max(1, entry.key.num_bytes)
