"""How soon entries are used again, learned from the requests themselves.

A *life* of an entry begins with a visit and ends with the next one. Lives are sorted into classes by what is known when
they begin; for each class and each age (in bins that grow by √2) the model holds the hazard, the rate of reuse per
second given that there was none so far: reuses ÷ time at risk. Classes refine one another (all entries of a kind; by
how often it was used; by how many visits continued one another; by how much the visit added), and each is drawn
towards the one above it by the weight of one reuse, so that a class says no more than it has seen (empirical Bayes with
a gamma prior). The uppermost prior is a hazard that falls with age, 1/2 ÷ (age + 8 s), under which the order of
eviction is that of LRU; nothing else is assumed, and no constant is fitted to a trace.

What is worth keeping is told by the best rate of reuse over any horizon, from the age on (Gittins' index; Aalto, Ayesta
and Righter, "On the Gittins index in the M/G/1 queue", 2009):

    index(a) = max over b > a of P(reused in (a, b]) ÷ E(seconds until b or the reuse)

Lives that have not ended count with their time at risk, also those of entries that were evicted, as long as they are
remembered: otherwise the model would learn what the policy does instead of what requests do.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from python_backends.errors import InternalError
from python_backends.kv.policies.base import BlockStats, Visit

Float64 = NDArray[np.float64]
Features = tuple[int, int, int, int]
"""Role (0 block, 1 last block of its visit, 2 tail), turn, tokens added, uses."""

EDGES: Float64 = np.concatenate([[0.0], 2.0 ** np.arange(0.0, 15.5, 0.5)])
"""[A] where each age bin begins, seconds; the last has no end."""
BINS = len(EDGES)
_EDGE_LIST: list[float] = EDGES.tolist()
_WIDTHS: Float64 = np.append(np.diff(EDGES), np.inf)
HORIZON_S = 2 * _EDGE_LIST[-1]
PRIOR: Float64 = 0.5 / (np.append((EDGES[:-1] + EDGES[1:]) / 2, EDGES[-1] * 1.5) + 8.0)
LEVELS: tuple[tuple[int, ...], ...] = ((0,), (0, 3), (0, 1, 3), (0, 1, 2, 3))
STRENGTH = 1.0
"""Reuses that a class's own evidence must outweigh."""
SMOOTH = np.array([0.25, 0.5, 0.25])
WINDOW = 16_384
"""Lives and visits that are learned from."""
FIRST_FIT = 64
"""Visits before the first fit; the next ones follow when there are an eighth more, at most REFIT later."""
REFIT = 256


@dataclass(slots=True, eq=False)
class _Record(Visit):
    """A visit and what the model counts of it."""

    size: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Entries by role that ever were part of it."""
    alive: dict[tuple[int, int], int] = field(default_factory=dict)
    """Entries whose newest visit this is, by role (0 or 2) and bucket of uses."""
    last: BlockStats | None = None
    """The deepest block."""
    rates: dict[int, list[float]] = field(default_factory=dict)
    version: tuple[int, int, int] = (-1, 0, 0)
    """For which state of the model and of the visit ``rates`` holds."""


@dataclass(slots=True)
class _Life:
    """Entries that were used together before and are used together again: one observation."""

    visit: _Record
    features: Features
    seconds: float
    weight: float


def age_bin(age: float) -> int:
    """Index into EDGES."""
    return bisect_right(_EDGE_LIST, age) - 1


def _bucket(value: int) -> int:
    """1, 2, 3, 4–5, 6–7, 8–11, … → 1, 2, 3, 4, 5, 6, …"""
    if value < 4:
        return max(value, 0)
    bits = value.bit_length()
    return 2 * bits - 2 + (value >> (bits - 2) & 1)


class ReuseModel:
    """See the module. Times never fall."""

    def __init__(self) -> None:
        self._visits: deque[_Record] = deque(maxlen=WINDOW)
        self._lives: deque[_Life] = deque(maxlen=WINDOW)
        self._seen = 0
        self._next_fit = FIRST_FIT
        self._factors: list[dict[tuple[int, ...], Float64]] = []
        self._index: dict[Features, list[float]] = {}
        self._hazards: dict[Features, Float64] = {}
        self.fits = 0
        """Changes when every index does."""

    # -- what the manager reports --------------------------------------------------------------------------------------
    def open_visit(self, now: float) -> Visit:
        """A request comes."""
        visit = _Record(now)
        self._visits.append(visit)
        self._seen += 1
        if self._seen >= self._next_fit:
            self._next_fit += min(max(FIRST_FIT, self._seen // 8), REFIT)
            self.fit(now)
        return visit

    def add(self, entry: BlockStats) -> None:
        """An entry begins its first life, in ``entry.visit``."""
        visit = entry.visit
        if not isinstance(visit, _Record):
            raise InternalError("visits are opened by the model")
        tail = entry.key.kind == "tail"
        where = (2 * tail, min(entry.uses, 4))
        visit.alive[where] = visit.alive.get(where, 0) + 1
        visit.size[2 * tail] += 1
        visit.end = max(visit.end, entry.key.position)
        if not tail and (visit.last is None or entry.key.position > visit.last.key.position):
            visit.last = entry

    def move(self, entry: BlockStats, visit: Visit, now: float) -> None:
        """A reuse: the entry's life ends, its next one begins in ``visit``. Entries of a visit come in prompt order."""
        self._end(entry, now)
        position = entry.key.position
        if position > visit.matched:
            before = entry.visit
            continues = 2 * position >= before.end
            visit.matched = position
            visit.turn, visit.gap = (before.turn + 1, visit.time - before.time) if continues else (1, 0.0)
        entry.visit = visit
        entry.uses += 1
        self.add(entry)

    def forget(self, entry: BlockStats) -> None:
        """The entry is not remembered any more: its life ended unseen, and is left out."""
        self._end(entry, None)

    def _end(self, entry: BlockStats, now: float | None) -> None:
        visit = entry.visit
        if not isinstance(visit, _Record):
            raise InternalError("visits are opened by the model")
        where = (2 * (entry.key.kind == "tail"), min(entry.uses, 4))
        features = self.features(entry)
        visit.alive[where] -= 1
        if visit.last is entry:
            visit.last = None
        if now is not None:
            weight, newest = self._weight(visit, features[0]), self._lives[-1] if self._lives else None
            if newest and newest.visit is visit and newest.features == features and newest.seconds == now - visit.time:
                newest.weight += weight
            else:
                self._lives.append(_Life(visit, features, now - visit.time, weight))

    @staticmethod
    def _weight(visit: _Record, role: int) -> float:
        """A visit's entries weigh as much as one together: they have one fate, be they many or few."""
        return 1.0 if role == 1 else 1.0 / max(1, visit.size[role] - (role == 0 and visit.size[0] > 1))

    # -- what policies ask ---------------------------------------------------------------------------------------------
    @staticmethod
    def features(entry: BlockStats) -> Features:
        """What is known at the beginning of its life."""
        visit = entry.visit
        role = 2 if entry.key.kind == "tail" else int(entry.key.position >= visit.end)
        return _features(role, visit, entry.uses)

    def rates(self, entry: BlockStats) -> list[float]:
        """`index` of its features; kept with the visit, since many entries share it."""
        visit = entry.visit
        if not isinstance(visit, _Record):
            raise InternalError("visits are opened by the model")
        version = (self.fits, visit.end, visit.turn)
        if visit.version != version:
            visit.version = version
            visit.rates.clear()
        role = 2 if entry.key.kind == "tail" else int(entry.key.position >= visit.end)
        where = 8 * role + min(entry.uses, 4)
        found = visit.rates.get(where)
        if found is None:
            found = visit.rates[where] = self.index(self.features(entry))
        return found

    def index(self, features: Features) -> list[float]:
        """[BINS] the best rate of reuse per second, by age."""
        found = self._index.get(features)
        if found is None:
            found = self._index[features] = gittins(self._hazard(features)).tolist()
        return found

    def probability(self, entry: BlockStats, now: float, within: float) -> float:
        """That it is used again in the next ``within`` seconds."""
        hazard = self._hazard(self.features(entry))
        age = now - entry.visit.time
        begin, end = np.maximum(EDGES, age), np.minimum(EDGES + _WIDTHS, age + within)
        return float(-np.expm1(-np.sum(hazard * np.maximum(end - begin, 0.0))))

    def _hazard(self, features: Features) -> Float64:
        found = self._hazards.get(features)
        if found is None:
            found = PRIOR
            for level, factors in zip(LEVELS, self._factors, strict=False):
                factor = factors.get(tuple(features[index] for index in level))
                if factor is not None:
                    found = found * factor
            self._hazards[features] = found
        return found

    # -- learning ------------------------------------------------------------------------------------------------------
    def fit(self, now: float) -> None:
        """Learn anew from the remembered lives and visits; milliseconds."""
        rows: dict[Features, int] = {}
        ended = [(rows.setdefault(life.features, len(rows)), life.seconds, life.weight) for life in self._lives]
        alive = [(rows.setdefault(features, len(rows)), now - visit.time, weight)
                 for visit in self._visits for features, weight in self._alive(visit)]  # fmt: skip
        table = np.array(ended + alive, dtype=np.float64).reshape(-1, 3)
        row, age, weight = table[:, 0].astype(np.int64), table[:, 1], table[:, 2]
        at_risk = np.zeros((len(rows), BINS))
        for index in range(BINS):
            seconds = np.clip(age - EDGES[index], 0.0, _WIDTHS[index]) * weight
            at_risk[:, index] = np.bincount(row, seconds, len(rows))
        reuses = np.zeros_like(at_risk)
        bins = np.searchsorted(EDGES, age[: len(ended)], side="right") - 1
        np.add.at(reuses, (row[: len(ended)], bins), weight[: len(ended)])
        self._fit_levels(list(rows), reuses, at_risk * PRIOR)

    def _alive(self, visit: _Record) -> Iterator[tuple[Features, float]]:
        last = visit.last
        for (role, uses), count in visit.alive.items():
            body = count - (role == 0 and last is not None and min(last.uses, 4) == uses)
            if body > 0:
                yield _features(role, visit, uses), body * self._weight(visit, role)
        if last is not None:
            yield _features(1, visit, last.uses), 1.0

    def _fit_levels(self, rows: list[Features], reuses: Float64, expected: Float64) -> None:
        """Level by level, each class's reuses over those expected by the levels above, drawn towards 1."""
        self._factors = []
        for depth, level in enumerate(LEVELS):
            classes: dict[tuple[int, ...], int] = {}
            of_row = np.array([classes.setdefault(tuple(row[i] for i in level), len(classes)) for row in rows])
            seen, due = np.zeros((len(classes), BINS)), np.zeros((len(classes), BINS))
            np.add.at(seen, of_row, reuses)
            np.add.at(due, of_row, expected)
            if depth:
                seen, due = (np.apply_along_axis(np.convolve, 1, part, SMOOTH, "same") for part in (seen, due))
            factors = (seen + STRENGTH) / (due + STRENGTH)
            expected = expected * factors[of_row]
            self._factors.append({key: factors[index] for key, index in classes.items()})
        self._index.clear()
        self._hazards.clear()
        self.fits += 1

    def check_integrity(self) -> None:
        """Raises InternalError where a visit counts lives below zero."""
        for visit in self._visits:
            if min(visit.alive.values(), default=0) < 0 or visit.size[0] < sum(
                count for (role, _), count in visit.alive.items() if role == 0
            ):
                raise InternalError(f"visit at {visit.time} counts {visit.alive} of {visit.size}")


def _features(role: int, visit: Visit, uses: int) -> Features:
    return role, min(_bucket(visit.turn), 12), max(0, visit.end - visit.matched).bit_length(), min(uses, 4)


def gittins(hazard: Float64) -> Float64:
    """[BINS] hazards per second, each constant in its bin → [BINS] index at the beginning of each bin."""
    widths = _WIDTHS.copy()
    widths[-1] = HORIZON_S
    risks = hazard * widths
    total = np.concatenate([[0.0], np.cumsum(risks)])
    # [a, b]: alive at the beginning of bin b, given alive at that of bin a ≤ b.
    alive = np.exp(np.minimum(total[:-1, None] - total[None, :], 0.0))
    waiting = np.cumsum(np.triu(alive[:, :-1]) * (-np.expm1(-risks) / hazard), axis=1)
    found: Float64 = np.max(np.triu((1.0 - alive[:, 1:]) / np.maximum(waiting, 1e-9)), axis=1)
    return found
