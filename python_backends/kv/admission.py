"""What is worth writing to NVMe at all: time saved by expected reuse against that of the write, and a daily budget."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import Protocol

from python_backends.kv.costs import LinkSpeeds
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


class WorthWriting:
    """Admits what is expected to save more time than writing it takes, and of that the likeliest, as much as a budget
    lets through.

    An entry is worth writing if its probability of reuse × (seconds to compute it − seconds to load it) is above the
    seconds of its write. The budget is a bucket that holds at most a tenth of a day's bytes and refills evenly; an
    entry passes if its probability of reuse ranks above the share ``1 − fill`` of those lately asked about: everything
    while the bucket is full, ever less as it empties, nothing beyond the budget.

    Args:
        reuse: the manager's model (`policies.PolicySet`).
        speeds: of the links to and from the disk.
        bytes_per_day: of writes; None: any number.
    """

    def __init__(self, reuse: ReuseModel, speeds: LinkSpeeds, bytes_per_day: float | None = None) -> None:
        self._reuse = reuse
        self._speeds = speeds
        self._rate = 0.0 if bytes_per_day is None else bytes_per_day / DAY_S
        self._size = None if bytes_per_day is None else bytes_per_day / 10
        self._level = self._size or 0.0
        self._time: float | None = None
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self.refused = 0

    def admits(self, entry: BlockStats, now: float) -> bool:
        """See `Admission`. Asked once per chance to be written."""
        likely = self._reuse.probability(entry, now, HORIZON_S)
        admitted = likely >= MIN_PROBABILITY and self._saves_time(entry, likely)
        if self._size is not None:
            admitted = self._within_budget(entry, likely, now, self._size, wanted=admitted)
        self.refused += not admitted
        return admitted

    def _saves_time(self, entry: BlockStats, likely: float) -> bool:
        if not entry.recompute_s:  # unknown: what was found on disk at start
            return True
        size = entry.key.num_bytes
        saved_s = entry.recompute_s - size / self._speeds.bytes_per_s(("nvme", "host"))
        return likely * saved_s > size / self._speeds.bytes_per_s(("host", "nvme"))

    def _within_budget(self, entry: BlockStats, likely: float, now: float, size: float, *, wanted: bool) -> bool:
        passed = 0.0 if self._time is None else max(0.0, now - self._time)
        self._time = now if self._time is None else max(now, self._time)
        self._level = min(size, self._level + passed * self._rate)
        rank = bisect_left(self._sorted, likely) / len(self._sorted) if self._sorted else 1.0
        self._remember(likely)
        if not wanted or rank < 1.0 - self._level / size or entry.key.num_bytes > self._level:
            return False
        self._level -= entry.key.num_bytes
        return True

    def _remember(self, likely: float) -> None:
        self._recent.append(likely)
        insort(self._sorted, likely)
        if len(self._recent) > RECENT:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
