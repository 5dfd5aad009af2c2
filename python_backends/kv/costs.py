"""Load or compute: what bringing KV back takes, from bandwidths measured while moving and the measured prefill speed.

A held beginning of a prompt can be loaded whole, computed whole, or both at once from its two ends: blocks are loaded
from the last one downwards (with the tail, which only a load gives) while prefill runs upwards from the first token,
and they meet where both take as long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from python_backends.kv.blocks import Tier

Link = tuple[Tier, Tier]
"""(source, target)."""

MEMORY_BYTES_PER_S, DISK_BYTES_PER_S = 4e9, 1e9
"""Taken for links that have moved nothing yet."""
HALF_LIFE_BYTES = 256 * 2**20
"""What was measured counts half after so many bytes more."""
HALF_LIFE_S = 60.0
"""And half after so long without a transfer: a link too slow to be chosen would never be measured again."""
WORTH_SHARE = 0.9
"""Both ends at once only where it takes at most this share of the better single way: it is more to coordinate."""


class LinkSpeeds:
    """Bandwidth of every link, an average over bytes that forgets (EWMA). Thread-safe.

    Args:
        assumed: bytes a second of links that nothing measured; None: `MEMORY_BYTES_PER_S`, `DISK_BYTES_PER_S`.
        clock: seconds, monotonic.
    """

    def __init__(
        self, assumed: Mapping[Link, float] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._assumed = dict(assumed or {})
        self._clock = clock
        self._sums: dict[Link, tuple[float, float]] = {}
        self._measured_s: dict[Link, float] = {}
        self._lock = threading.Lock()

    def record(self, link: Link, num_bytes: int, seconds: float) -> None:
        """A transfer ended."""
        with self._lock:
            total, took = self._sums.get(link, (0.0, 0.0))
            keep = 0.5 ** (num_bytes / HALF_LIFE_BYTES)
            self._sums[link] = (total * keep + num_bytes, took * keep + seconds)
            self._measured_s[link] = self._clock()

    def bytes_per_s(self, link: Link) -> float:
        """Measured, else assumed; in between where nothing was moved for long."""
        with self._lock:
            total, took = self._sums.get(link, (0.0, 0.0))
            idle_s = self._clock() - self._measured_s.get(link, self._clock())
        assumed = self._assumed.get(link, DISK_BYTES_PER_S if "nvme" in link else MEMORY_BYTES_PER_S)
        if total <= 0 or took <= 0:
            return assumed
        known = float(0.5 ** (idle_s / HALF_LIFE_S))
        return 1 / (known * took / total + (1 - known) / assumed)

    def as_dict(self) -> dict[str, float]:
        """ "source→target" to bytes a second, of the links that were measured."""
        with self._lock:
            links = list(self._sums)
        return {f"{source}→{target}": self.bytes_per_s((source, target)) for source, target in links}


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry that may be loaded."""

    num_bytes: int
    links: tuple[Link, ...]
    """What it passes, one after the other; none where it is in place already."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with a held beginning."""

    way: Literal["load", "recompute", "both"]
    computed_blocks: int
    """Blocks from the first on that prefill computes; the others are loaded, and the tail unless all are computed."""
    seconds: float
    """What it is expected to take."""
    load_s: float
    """Loading everything."""
    recompute_s: float
    """Computing everything."""


def choose(
    blocks: Sequence[Piece], tail: Piece, *, tokens: int, block_tokens: int, tokens_per_s: float, speeds: LinkSpeeds
) -> Plan:
    """The fastest way to ``tokens`` held tokens: full ``blocks`` in prompt order and the ``tail`` behind them.

    ``tokens_per_s`` is the prefill speed that this request would get. Links work beside each other, entries of one
    link after each other.
    """
    loads = _load_seconds(blocks, tail, speeds)
    recompute_s = tokens / tokens_per_s
    mixed = [max(index * block_tokens / tokens_per_s, load) for index, load in enumerate(loads)]
    at = min(range(len(mixed)), key=mixed.__getitem__)
    if at > 0 and mixed[at] <= WORTH_SHARE * min(loads[0], recompute_s):
        return Plan("both", at, mixed[at], loads[0], recompute_s)
    if loads[0] <= recompute_s:
        return Plan("load", 0, loads[0], loads[0], recompute_s)
    return Plan("recompute", len(blocks), recompute_s, loads[0], recompute_s)


def _load_seconds(blocks: Sequence[Piece], tail: Piece, speeds: LinkSpeeds) -> list[float]:
    """Seconds to load the tail and the blocks from ``index`` on, for every index 0 … len(blocks)."""
    links = {link for piece in (*blocks, tail) for link in piece.links}
    total = [0.0] * (len(blocks) + 1)
    for link in links:
        pieces = [tail, *reversed(blocks)]
        sums = accumulate(piece.num_bytes if link in piece.links else 0 for piece in pieces)
        speed = speeds.bytes_per_s(link)
        total = [max(seconds, num / speed) for seconds, num in zip(total, reversed(list(sums)), strict=True)]
    return total
