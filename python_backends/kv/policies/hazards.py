"""When entries are used again, as numbers: hazards that are a product of factors, and Gittins' index of a hazard.

A *code* packs what is known of an entry when its life begins (`pack`). The hazard, reuses per second given that there
was none so far, is constant in each age bin, and

    hazard(age, code) = prior(age) × Π over features  factor(role, feature, age)

Each factor is reuses seen ÷ reuses expected under the other factors, drawn towards 1 by the weight of one reuse
(empirical Bayes with a gamma prior), found by a few rounds of iterative proportional fitting. So every feature speaks
from all the lives that share it, and combinations that were never seen are told from their parts. The prior falls with
age, 1/2 ÷ (age + 8 s), under which the order of eviction is that of LRU. No constant is fitted to a trace.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

PER_OCTAVE = 1
EDGES: Float64 = 2.0 ** (np.arange(15 * PER_OCTAVE + 1) / PER_OCTAVE) - 1
"""[BINS] where each age bin begins, seconds; the last has no end."""
BINS = len(EDGES)
EDGE_LIST: list[float] = EDGES.tolist()
_WIDTHS: Float64 = np.append(np.diff(EDGES), np.inf)
HORIZON_S = 2 * EDGE_LIST[-1]
WIDTH_LIST: list[float] = [*_WIDTHS[:-1].tolist(), HORIZON_S]
"""Seconds; the last bin counts for so long."""
_SPANS: Float64 = np.array(WIDTH_LIST)
PRIOR: Float64 = 0.5 / (np.append((EDGES[:-1] + EDGES[1:]) / 2, EDGES[-1] * 1.5) + 8.0)
STRENGTH = 1.0
"""Reuses that a class's own evidence must outweigh."""
_LATER: Float64 = np.triu(np.ones((BINS, BINS)))
"""[a, b] 1 where bin b is not before bin a."""
SMOOTH = (0.25, 0.5, 0.25)
PASSES = 3
MOST_TURNS = 8
_FIELDS = {"role": (0, 2), "uses": (2, 3), "turn": (5, 4), "gap": (9, 5), "added": (14, 5), "end": (19, 5),
           "answer": (24, 5)}  # fmt: skip
"""Shift and bits of each feature in a code."""


def _mask(*names: str) -> int:
    return sum((1 << bits) - 1 << shift for shift, bits in (_FIELDS[name] for name in names))


FACTORS = (
    _mask("role"),
    *(_mask("role", name) for name in ("uses", "turn", "added", "end", "gap", "answer")),
    _mask("role", "turn", "added"),
)


def age_bin(age: float) -> int:
    """Index into EDGES."""
    return min(int(PER_OCTAVE * math.log2(max(age, 0.0) + 1.0)), BINS - 1)


def _bins(ages: Float64) -> Int64:
    """`age_bin` of each."""
    found: Int64 = np.minimum(PER_OCTAVE * np.log2(ages + 1.0), BINS - 1.0).astype(np.int64)
    return found


def gap_class(seconds: float) -> int:
    """1 and more."""
    return min(2 + math.frexp(seconds + 1.0)[1] - 1, 31)


def size_class(tokens: int) -> int:
    """Three classes to a factor of four, none below 64 tokens."""
    return min(int(1.5 * math.log2(tokens / 64 + 1)), 31) if tokens > 0 else 0


def pack_visit(turn: int, added: int, end: int, answer: int) -> int:
    """What the entries of one visit share: continued visits in a row, tokens it added, tokens up to its end, and those
    of its answer (0: not known)."""
    return min(turn, MOST_TURNS) << 5 | size_class(added) << 14 | size_class(end) << 19 | size_class(answer) << 24


def pack_entry(role: int, uses: int, gap: int) -> int:
    """What an entry adds: role (0 block, 1 last block of its visit, 2 tail), visits that used it, `gap_class` or 0."""
    return role | min(uses, 7) << 2 | gap << 9


class Hazards:
    """The fitted product. Codes that were not seen are answered for as well."""

    def __init__(self) -> None:
        self._factors: list[dict[int, Float64]] = []

    def of(self, codes: Sequence[int]) -> Float64:
        """[len(codes), BINS] hazards per second."""
        found = np.repeat(PRIOR[None], len(codes), 0)
        for mask, factors in zip(FACTORS, self._factors, strict=False):
            for row, code in enumerate(codes):
                factor = factors.get(code & mask)
                if factor is not None:
                    found[row] *= factor
        return found

    def fit(self, ended: tuple[Int64, Float64, Float64], alive: tuple[Int64, Float64, Float64]) -> None:
        """Learn from lives: (codes, ages, weights) of those that ended with a reuse and of those that go on."""
        codes = np.concatenate([ended[0], alive[0]])
        age = np.concatenate([ended[1], alive[1]])
        weight = np.concatenate([ended[2], alive[2]])
        known, row = np.unique(codes, return_inverse=True)
        bins = _bins(age)
        cell = row * BINS + bins
        shape, cells = (len(known), BINS), len(known) * BINS
        count = np.bincount(cell, weight, cells).reshape(shape)
        partial = np.bincount(cell, weight * (age - EDGES[bins]), cells).reshape(shape)
        later = np.cumsum(count[:, ::-1], 1)[:, ::-1] - count
        at_risk = partial + later * np.append(_WIDTHS[:-1], 0.0)
        first = len(ended[0])
        reuses = np.bincount(cell[:first], weight[:first], cells).astype(np.float64).reshape(shape)
        self._fit_factors(known, reuses, at_risk * PRIOR)

    def _fit_factors(self, known: Int64, reuses: Float64, expected: Float64) -> None:
        """Iterative proportional fitting of every factor in turn."""
        classes = [np.unique(known & mask, return_inverse=True) for mask in FACTORS]
        seen = [_smooth(_sum_rows(reuses, of_row, len(keys))) for keys, of_row in classes]
        factors = [np.ones((len(keys), BINS)) for keys, _ in classes]
        for _ in range(PASSES):
            for index, (keys, of_row) in enumerate(classes):
                due = _smooth(_sum_rows(expected, of_row, len(keys)) / factors[index])
                fitted = (seen[index] + STRENGTH) / (due + STRENGTH)
                expected *= (fitted / factors[index])[of_row]
                factors[index] = fitted
        self._factors = [
            dict(zip(keys.tolist(), values, strict=True)) for (keys, _), values in zip(classes, factors, strict=True)
        ]


def _sum_rows(values: Float64, of_row: Int64, classes: int) -> Float64:
    """[rows, BINS] → [classes, BINS]."""
    cell = (of_row[:, None] * BINS + np.arange(BINS)).ravel()
    return np.bincount(cell, values.ravel(), classes * BINS).astype(np.float64).reshape(classes, BINS)


def _smooth(values: Float64) -> Float64:
    """Over neighbouring ages; sums are kept but at the ends."""
    padded = np.pad(values, ((0, 0), (1, 1)), mode="edge")
    found: Float64 = SMOOTH[0] * padded[:, :-2] + SMOOTH[1] * padded[:, 1:-1] + SMOOTH[2] * padded[:, 2:]
    return found


def gittins(hazard: Float64) -> Float64:
    """[…, BINS] hazards per second, each constant in its bin → […, BINS] index at the beginning of each bin."""
    risks = hazard * _SPANS
    total = np.concatenate([np.zeros((*hazard.shape[:-1], 1)), np.cumsum(risks, -1)], -1)
    # […, a, b]: alive at the beginning of bin b, given alive at that of bin a ≤ b.
    alive = np.exp(np.minimum(total[..., :-1, None] - total[..., None, :], 0.0))
    waiting = np.cumsum(_LATER * alive[..., :-1] * (-np.expm1(-risks) / hazard)[..., None, :], axis=-1)
    found: Float64 = (_LATER * (1.0 - alive[..., 1:]) / np.maximum(waiting, 1e-9)).max(axis=-1)
    return found


def cumulative_risk(hazard: Float64) -> list[float]:
    """[BINS] hazards per second → [BINS + 1] expected reuses up to the beginning of each bin and the horizon's end."""
    found: list[float] = np.concatenate([[0.0], np.cumsum(hazard * _SPANS)]).tolist()
    return found


class Indices:
    """Gittins' indices by code, computed when they are first asked for, many at once."""

    def __init__(self, hazards: Hazards) -> None:
        self._hazards = hazards
        self._rows: dict[int, int] = {}
        self.table: Float64 = np.empty((256, BINS + 1))
        """[rows or more, BINS + 1] index at the beginning of each bin; the last bin's is repeated."""

    def rows(self, codes: Iterable[int]) -> list[int]:
        """Rows of the table."""
        asked = list(codes)
        missing = [code for code in dict.fromkeys(asked) if code not in self._rows]
        if missing:
            begin = len(self._rows)
            while begin + len(missing) > len(self.table):
                self.table = np.concatenate([self.table, np.empty_like(self.table)])
            found = gittins(self._hazards.of(missing))
            self.table[begin : begin + len(missing), :BINS] = found
            self.table[begin : begin + len(missing), BINS] = found[:, -1]
            self._rows.update(zip(missing, range(begin, begin + len(missing)), strict=True))
        return [self._rows[code] for code in asked]

    def at(self, rows: Int64, ages: Float64) -> Float64:
        """[N] indices, interpolated between the beginnings of bins."""
        bins = _bins(ages)
        share = np.minimum((ages - EDGES[bins]) / _SPANS[bins], 1.0)
        low, high = self.table[rows, bins], self.table[rows, bins + 1]
        found: Float64 = low + share * (high - low)
        return found

    def at_one(self, row: int, age: float) -> float:
        """As `at`."""
        index = age_bin(age)
        low, high = self.table[row, index : index + 2].tolist()
        return float(low + min((age - EDGE_LIST[index]) / WIDTH_LIST[index], 1.0) * (high - low))

    def clear(self) -> None:
        """After a fit."""
        self._rows.clear()
