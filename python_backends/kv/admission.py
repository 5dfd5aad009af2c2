"""What is worth writing to NVMe at all: expected reuse against a budget of bytes a day."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import Protocol

from python_backends.kv.policies.base import BlockStats
from python_backends.kv.policies.reuse import ReuseModel

DAY_S = 86_400.0
HORIZON_S = 6 * 3600.0
"""A reuse later than this is not waited for."""
MIN_PROBABILITY = 0.02
"""Below one reuse in fifty writes a disk's wear is not worth it, whatever the budget."""
RECENT = 512


class Admission(Protocol):
    """Asked when an entry could be demoted to NVMe."""

    def admits(self, entry: BlockStats, now: float) -> bool:
        """Whether to write it; if so its bytes are counted against the budget."""
        ...


class WriteBudget:
    """Admits the entries most likely to be reused, as many as the budget lets through.

    A bucket holds at most a tenth of a day's bytes and refills evenly. An entry passes if its probability of reuse
    ranks above the share ``1 − fill`` of those lately asked about: everything while the bucket is full, ever less as
    it empties, nothing beyond the budget.

    Args:
        reuse: the manager's model (`policies.PolicySet`).
        bytes_per_day: of writes; at least one.
    """

    def __init__(self, reuse: ReuseModel, bytes_per_day: float) -> None:
        self._reuse = reuse
        self._rate = bytes_per_day / DAY_S
        self._size = bytes_per_day / 10
        self._level = self._size
        self._time: float | None = None
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self.refused = 0

    def admits(self, entry: BlockStats, now: float) -> bool:
        """See `Admission`. Asked once per chance to be written."""
        passed = 0.0 if self._time is None else max(0.0, now - self._time)
        self._time = now if self._time is None else max(now, self._time)
        self._level = min(self._size, self._level + passed * self._rate)
        likely = self._reuse.probability(entry, now, HORIZON_S)
        rank = bisect_left(self._sorted, likely) / len(self._sorted) if self._sorted else 1.0
        self._remember(likely)
        fill = self._level / self._size
        if likely < MIN_PROBABILITY or rank < 1.0 - fill or entry.key.num_bytes > self._level:
            self.refused += 1
            return False
        self._level -= entry.key.num_bytes
        return True

    def _remember(self, likely: float) -> None:
        self._recent.append(likely)
        insort(self._sorted, likely)
        if len(self._recent) > RECENT:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
