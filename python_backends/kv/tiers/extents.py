"""Free space of an arena, and which extents to move so that a longer run becomes free. Addresses and sizes only.

Small entries are taken from the low end of free runs and large ones from the high end, best fit first: so the two sizes
of KV entries (a block, and a tail that may be forty times as large) end up apart, and holes fit what comes next.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from python_backends.errors import InternalError


class FreeRuns:
    """The free parts of ``[0, size)``. Invariants: sorted, never empty, never touching each other."""

    def __init__(self, size: int) -> None:
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        self.total = 0
        self.release(0, size)

    @property
    def largest(self) -> int:
        """Size of the longest run."""
        return self._by_size[-1][0] if self._by_size else 0

    def runs(self) -> list[tuple[int, int]]:
        """(start, size), by address."""
        return [(start, self._sizes[start]) for start in self._starts]

    def acquire(self, size: int, *, high: bool = False) -> int | None:
        """Start of ``size`` bytes taken from the run that fits best; None where none is long enough."""
        index = bisect_left(self._by_size, (size, -1))
        if index == len(self._by_size):
            return None
        run_size, start = self._by_size[index]
        if high:  # of several that fit as well, the one furthest up
            run_size, start = self._by_size[bisect_right(self._by_size, (run_size, 1 << 63)) - 1]
            start += run_size - size
        self.take(start, size)
        return start

    def acquire_at(self, start: int, size: int) -> bool:
        """Take exactly these bytes, where they are the beginning of a free run."""
        if self._sizes.get(start, 0) < size:
            return False
        self.take(start, size)
        return True

    def take(self, start: int, size: int) -> None:
        """Take a part of one free run."""
        index = bisect_right(self._starts, start) - 1
        run = self._starts[index] if index >= 0 else -1
        end = run + self._sizes.get(run, 0)
        if run < 0 or start + size > end:
            raise InternalError(f"bytes {start}…{start + size} of an arena are not free")
        self._remove(run)
        self._add(run, start - run)
        self._add(start + size, end - start - size)

    def release(self, start: int, size: int) -> None:
        """Give bytes back; runs that touch become one."""
        index = bisect_left(self._starts, start)
        before = self._starts[index - 1] if index else None
        after = self._starts[index] if index < len(self._starts) else None
        end = start + size
        if (before is not None and before + self._sizes[before] > start) or (after is not None and after < end):
            raise InternalError(f"bytes {start}…{end} of an arena were freed twice")
        if before is not None and before + self._sizes[before] == start:
            start = before
            self._remove(before)
        if after == end:
            end += self._sizes[after]
            self._remove(after)
        self._add(start, end - start)

    def _add(self, start: int, size: int) -> None:
        if size:
            insort(self._starts, start)
            self._sizes[start] = size
            insort(self._by_size, (size, start))
            self.total += size

    def _remove(self, start: int) -> None:
        size = self._sizes.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        self.total -= size

    def check_integrity(self) -> None:
        """Raises InternalError where the invariants do not hold."""
        runs = self.runs()
        apart = all(start + size < after for (start, size), (after, _) in pairwise(runs))
        same = sorted((size, start) for start, size in runs) == self._by_size
        if not (apart and same and all(size > 0 for _, size in runs) and self.total == sum(size for _, size in runs)):
            raise InternalError("free runs of an arena overlap, touch or are miscounted")


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of an arena: free (``index`` −1) or an extent, by its number in the caller's list."""

    start: int
    size: int
    index: int
    movable: bool

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.start + self.size


@dataclass(frozen=True)
class Relocation:
    """Extents to move, in this order; once all are where they go, ``[start, end)`` is free.

    All of ``[begin, end)`` takes part: nothing else may use its free bytes meanwhile.
    """

    moves: tuple[tuple[int, int], ...]
    """(extent's number, its new start), within ``[begin, start)`` or outside ``[begin, end)``."""
    begin: int
    start: int
    end: int
    moved_bytes: int


def spans_of(extents: Sequence[tuple[int, int, bool]], free: FreeRuns) -> list[Span]:
    """All of an arena by address; ``extents`` are (start, size, movable). Stretches in neither may not be touched."""
    spans = [Span(start, size, index, movable) for index, (start, size, movable) in enumerate(extents)]
    spans += [Span(start, size, -1, True) for start, size in free.runs()]
    spans.sort(key=lambda span: span.start)
    return spans


def plan_relocation(spans: Sequence[Span], size: int) -> Relocation | None:
    """The cheapest way to ``size`` free bytes in one piece, None where immovable extents leave no way.

    Tried first: empty a window by moving its extents into holes elsewhere, which moves at most ``size`` bytes and a
    bit. Where holes are too small for that: slide neighbours together until the gaps between them add up.
    """
    windows = sorted(_windows(spans, size), key=lambda window: window[2])
    for first, last, cost in windows[:16]:
        moves = _into_holes(spans, first, last)
        if moves is not None:
            return Relocation(moves, spans[first].start, spans[first].start, spans[last].end, cost)
    return _slide(spans, size)


def _windows(spans: Sequence[Span], size: int) -> list[tuple[int, int, int]]:
    """(first, last, bytes to move) of shortest windows of adjacent movable spans that cover ``size`` bytes."""
    found = []
    first, used = 0, 0
    for last, span in enumerate(spans):
        if not span.movable or (last and spans[last - 1].end != span.start):
            first, used = last, 0
        if not span.movable:
            first = last + 1
            continue
        used += span.size if span.index >= 0 else 0
        while first < last and span.end - spans[first + 1].start >= size:
            used -= spans[first].size if spans[first].index >= 0 else 0
            first += 1
        if span.end - spans[first].start >= size:
            found.append((first, last, used))
    return found


def _into_holes(spans: Sequence[Span], first: int, last: int) -> tuple[tuple[int, int], ...] | None:
    """Where each extent of a window fits into a hole outside it, largest extents first into the smallest hole."""
    holes = sorted(
        (span.size, span.start) for at, span in enumerate(spans) if span.index < 0 and not first <= at <= last
    )
    moves = []
    for span in sorted((s for s in spans[first : last + 1] if s.index >= 0), key=lambda s: -s.size):
        at = bisect_left(holes, (span.size, -1))
        if at == len(holes):
            return None
        hole, start = holes.pop(at)
        moves.append((span.index, start))
        if hole > span.size:
            insort(holes, (hole - span.size, start + span.size))
    return tuple(moves)


def _slide(spans: Sequence[Span], size: int) -> Relocation | None:
    """Pack the cheapest stretch whose gaps add up to ``size`` towards its low end."""
    best: tuple[int, int, int] | None = None
    first, used, gaps = 0, 0, 0
    for last, span in enumerate(spans):
        if not span.movable or (last and spans[last - 1].end != span.start):
            first, used, gaps = last, 0, 0
        if not span.movable:
            first = last + 1
            continue
        used, gaps = (used + span.size, gaps) if span.index >= 0 else (used, gaps + span.size)
        while gaps - (spans[first].size if spans[first].index < 0 else 0) >= size:
            used -= spans[first].size if spans[first].index >= 0 else 0
            gaps -= spans[first].size if spans[first].index < 0 else 0
            first += 1
        if gaps >= size and (best is None or used < best[2]):
            best = (first, last, used)
    if best is None:
        return None
    first, last, used = best
    moves, at = [], spans[first].start
    for span in spans[first : last + 1]:
        if span.index >= 0:
            moves.append((span.index, at))
            at += span.size
    return Relocation(tuple(moves), spans[first].start, at, spans[last].end, used)
