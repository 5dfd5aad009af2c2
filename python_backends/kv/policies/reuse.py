"""How soon entries are used again, learned from the requests themselves.

A *life* of an entry begins with a visit and ends with the next one. Entries that were used together, equally often and
after an equal pause, lead one life as a *group*; a visit's blocks weigh as much as one together, be they many or few.
`hazards` holds the rate of reuse by age for what was known when a life began.

What is worth keeping is told by the best rate of reuse over any horizon, from the age on (Gittins' index; Aalto, Ayesta
and Righter, "On the Gittins index in the M/G/1 queue", 2009):

    index(a) = max over b > a of P(reused in (a, b]) ÷ E(seconds until b or the reuse)

Lives that have not ended count with their time at risk, also those of entries that were evicted, as long as they are
remembered: otherwise the model would learn what the policy does instead of what requests do.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from python_backends.errors import InternalError
from python_backends.kv.policies.base import BlockStats, Visit
from python_backends.kv.policies.guard import Guard
from python_backends.kv.policies.hazards import (
    EDGE_LIST,
    WIDTH_LIST,
    Float64,
    Hazards,
    Indices,
    Int64,
    age_bin,
    cumulative_risk,
    gap_class,
    pack_entry,
    pack_visit,
)

WINDOW = 16_384
"""Lives and groups that are learned from."""
FIRST_FIT = 64
"""Visits before the first fit; the next ones follow when there are a quarter more, at most REFIT later."""
REFIT = 512
MOST_USES = 4
BLOCK, LAST, TAIL = 0, 1, 2
"""Roles; the last block of a visit is often a part of a block, never met again."""
FIRST_LIFE = {"block": pack_entry(BLOCK, 1, 0), "tail": pack_entry(TAIL, 1, 0)}


@dataclass(slots=True, eq=False)
class _Record(Visit):
    """A visit and what the model counts of it."""

    blocks: int = 0
    tails: int = 0
    """Entries that ever were part of it."""
    groups: dict[int, Group] = field(default_factory=dict)
    """By `pack_entry` of role BLOCK or TAIL."""
    last: BlockStats | None = None
    """The deepest block."""
    gap_class: int = 0
    """Of the seconds since the visit that it continues; 0 where there is none."""
    packed: int = 0
    """`pack_visit`, as it was for this end and answer."""
    packed_of: tuple[int, int] = (-1, 0)
    newest: tuple[Group, Group] | None = None
    """The group an entry came from and the one it went to, most recently: the next one mostly does the same."""

    def pack(self) -> int:
        if self.packed_of != (self.end, self.answer):
            self.packed_of = (self.end, self.answer)
            self.packed = pack_visit(self.turn, self.end - self.matched, self.end, self.answer)
        return self.packed


@dataclass(slots=True, eq=False)
class Group:
    """Entries of one visit that lead one life."""

    packed: int
    alive: int = 0
    """Entries whose newest visit this is."""
    reused_by: _Record | None = None
    """The visit that the newest observation is of."""
    observation: int = 0
    """Its number."""


class ReuseModel:
    """See the module. Times never fall.

    Args:
        guard: watches whether what is learned serves better than LRU; None: it is trusted.
    """

    def __init__(self, guard: Guard | None = None) -> None:
        self.guard = guard
        self._visits: deque[_Record] = deque(maxlen=WINDOW)
        self._codes, self._ages, self._weights = array("q"), array("d"), array("d")
        self._dropped = 0
        """Observations that were given up: the number of the first one there is."""
        self._seen = 0
        self._next_fit = FIRST_FIT
        self._hazards = Hazards()
        self.indices = Indices(self._hazards)
        self._risks: dict[int, list[float]] = {}
        """`cumulative_risk` by code, since the newest fit."""
        self.fits = 0
        """Changes when every index does."""

    # -- what the manager reports --------------------------------------------------------------------------------------
    def open_visit(self, now: float) -> Visit:
        """A request comes."""
        visit = _Record(now)
        self._visits.append(visit)
        self._seen += 1
        if self._seen >= self._next_fit:
            self._next_fit += min(max(FIRST_FIT, self._seen // 4), REFIT)
            self.fit(now)
        if self.guard is not None:
            self.guard.on_visit(visit)
        return visit

    def add(self, entry: BlockStats) -> None:
        """An entry begins its first life, in ``entry.visit``."""
        visit = _record(entry.visit)
        entry.life = FIRST_LIFE[entry.key.kind]
        self._join(entry, visit, self._group(visit, entry.life))
        if self.guard is not None:
            self.guard.on_new(entry)

    def move(self, entry: BlockStats, visit: Visit, now: float, *, held: bool = True) -> None:
        """A reuse: the entry's life ends, its next one begins in ``visit``. Entries of a visit come in prompt order.

        ``held`` False: it was remembered, but had been evicted and was computed again.
        """
        record, before = _record(visit), _record(entry.visit)
        if self.guard is not None:
            self.guard.on_use(entry, visit, held=held)
        position = entry.key.position
        if position > record.matched:
            record.matched = position
            if 2 * position >= before.end:
                record.turn, record.gap_class = before.turn + 1, gap_class(record.time - before.time)
            else:
                record.turn, record.gap_class = 1, 0
        old = self._end(entry, before, record, now)
        entry.visit = record
        entry.uses += 1
        newest = record.newest
        if newest is None or newest[0] is not old:
            life = pack_entry(entry.life & 3, min(entry.uses, MOST_USES), gap_class(record.time - before.time))
            newest = record.newest = (old, self._group(record, life))
        entry.life = newest[1].packed
        self._join(entry, record, newest[1])

    def forget(self, entry: BlockStats) -> None:
        """The entry is not remembered any more: its life ended unseen, and is left out."""
        self._end(entry, _record(entry.visit), None, 0.0)

    @staticmethod
    def _group(visit: _Record, life: int) -> Group:
        group = visit.groups.get(life)
        if group is None:
            group = visit.groups[life] = Group(life)
        return group

    @staticmethod
    def _join(entry: BlockStats, visit: _Record, group: Group) -> None:
        group.alive += 1
        position = entry.key.position
        visit.end = max(visit.end, position)
        if entry.key.kind == "tail":
            visit.tails += 1
            return
        visit.blocks += 1
        if visit.last is None or position > visit.last.key.position:
            visit.last = entry

    def _end(self, entry: BlockStats, visit: _Record, by: _Record | None, now: float) -> Group:
        group = visit.groups[entry.life]
        group.alive -= 1
        was_last = visit.last is entry
        if was_last:
            visit.last = None
        if by is None:
            return group
        if was_last:
            self._observe(_life_code(visit, group.packed) | LAST, now - visit.time, 1.0)
        elif group.reused_by is by and group.observation >= self._dropped:
            self._weights[group.observation - self._dropped] += self._weight(visit, entry.life & 3)
        else:
            group.reused_by, group.observation = by, self._dropped + len(self._codes)
            self._observe(_life_code(visit, group.packed), now - visit.time, self._weight(visit, entry.life & 3))
        return group

    def _observe(self, code: int, age: float, weight: float) -> None:
        self._codes.append(code)
        self._ages.append(age)
        self._weights.append(weight)

    @staticmethod
    def _weight(visit: _Record, role: int) -> float:
        """A visit's entries weigh as much as one together: they have one fate, be they many or few."""
        return 1.0 / max(1, visit.tails if role == TAIL else visit.blocks - 1)

    # -- what policies ask ---------------------------------------------------------------------------------------------
    @staticmethod
    def code(entry: BlockStats) -> int:
        """What is known at the beginning of its life, see `hazards`."""
        visit = _record(entry.visit)
        code = _life_code(visit, entry.life)
        return code | LAST if entry.key.position >= visit.end and entry.key.kind == "block" else code

    def index(self, entry: BlockStats, now: float) -> float:
        """The best rate of reuse per second from now on."""
        (row,) = self.indices.rows([self.code(entry)])
        return self.indices.at_one(row, now - entry.visit.time)

    def hazard(self, entry: BlockStats) -> Float64:
        """[BINS] reuses per second by age."""
        found: Float64 = self._hazards.of([self.code(entry)])[0]
        return found

    def probability(self, entry: BlockStats, now: float, within: float) -> float:
        """That it is used again in the next ``within`` seconds."""
        code = self.code(entry)
        risks = self._risks.get(code)
        if risks is None:
            risks = self._risks[code] = cumulative_risk(self._hazards.of([code])[0])
        age = now - entry.visit.time
        return -math.expm1(_between(risks, age) - _between(risks, age + within))

    # -- learning ------------------------------------------------------------------------------------------------------
    def fit(self, now: float) -> None:
        """Learn anew from the remembered lives and visits; milliseconds."""
        surplus = len(self._codes) - WINDOW
        if surplus > 0:
            for kept in (self._codes, self._ages, self._weights):
                del kept[:surplus]
            self._dropped += surplus
        ended: tuple[Int64, Float64, Float64] = (
            np.array(self._codes, np.int64), np.array(self._ages), np.array(self._weights)
        )  # fmt: skip
        codes, ages, weights = array("q"), array("d"), array("d")
        for visit in self._visits:
            self._alive(visit, now, codes, ages, weights)
        self._hazards.fit(ended, (np.array(codes, np.int64), np.array(ages), np.array(weights)))
        self.indices.clear()
        self._risks.clear()
        self.fits += 1

    def _alive(self, visit: _Record, now: float, codes: array[int], ages: array[float], weights: array[float]) -> None:
        """Add what is alive of a visit."""
        last, age = visit.last, now - visit.time
        own = None if last is None else last.life
        for life, group in visit.groups.items():
            count = group.alive - (life == own)
            if count > 0:
                codes.append(_life_code(visit, life))
                ages.append(age)
                weights.append(count * self._weight(visit, life & 3))
        if own is not None:
            codes.append(_life_code(visit, own) | LAST)
            ages.append(age)
            weights.append(1.0)

    def check_integrity(self) -> None:
        """Raises InternalError where a visit counts lives below zero, or more than it ever had."""
        for visit in self._visits:
            alive = [group.alive for group in visit.groups.values()]
            if min(alive, default=0) < 0 or sum(alive) > visit.blocks + visit.tails:
                raise InternalError(f"visit at {visit.time} counts {alive} of {visit.blocks} + {visit.tails}")


def _between(risks: list[float], age: float) -> float:
    """Expected reuses up to ``age``, from those up to the beginning of each bin."""
    index = age_bin(age)
    return risks[index] + (age - EDGE_LIST[index]) * (risks[index + 1] - risks[index]) / WIDTH_LIST[index]


def _life_code(visit: _Record, life: int) -> int:
    """Where an entry was used once, the pause before its visit speaks for its own."""
    code = visit.pack() | life
    return code if life >> 9 else code | visit.gap_class << 9


def _record(visit: Visit) -> _Record:
    if not isinstance(visit, _Record):
        raise InternalError("visits are opened by the model")
    return visit


__all__ = ["FIRST_FIT", "Group", "ReuseModel"]
