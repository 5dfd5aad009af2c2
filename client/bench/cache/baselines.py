"""Policies to compare with: queues with ghosts (ARC, S3-FIFO), hit density (LHD), and Belady's with the future known.

All keep the manager's rule that only leaves leave. The queues put shielded entries back at their end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence

import numpy as np

from python_backends.errors import InternalError
from python_backends.kv.blocks import EntryId
from python_backends.kv.policies.base import BlockStats
from python_backends.kv.policies.leaves import LeafHeap, Score

NEVER = float("inf")


class Belady(LeafHeap):
    """Evicts what is used again last (Belady 1966). ``uses``: for each entry the times it is asked for, rising."""

    name = "belady"

    def __init__(self, uses: Mapping[EntryId, Sequence[float]]) -> None:
        super().__init__()
        self._uses = uses

    def score(self, entry: BlockStats, now: float) -> Score:
        """Minus the next use after the newest one."""
        times = self._uses[entry.key.id]
        after = bisect_right(times, entry.visit.time)
        return (-times[after] if after < len(times) else -NEVER, -entry.key.position)


class LHD(LeafHeap):
    """Least hit density (Beckmann, Chen, Cidon, NSDI 2018): evicts the lowest expected hits per time still to be spent.

    Hits and evictions are counted by class (uses, at most four) and age, and decay; densities are renewed, and all
    leaves scored again, after as many evictions as there are leaves, at most `RENEWAL`.
    """

    name = "lhd"
    AGES = 64
    RENEWAL = 4096
    DECAY = 0.9

    def __init__(self) -> None:
        super().__init__()
        self._hits = np.zeros((5, self.AGES))
        self._evictions = np.zeros((5, self.AGES))
        self._density = [[1.0 / (age + 1)] * self.AGES for age in range(5)]
        self._used: dict[BlockStats, tuple[float, int]] = {}
        self._events = 0

    @staticmethod
    def _age(seconds: float) -> int:
        return min(LHD.AGES - 1, int(4 * np.log2(1 + seconds)))

    def score(self, entry: BlockStats, now: float) -> Score:
        """Hit density of its class at its age."""
        age = self._age(now - entry.visit.time)
        return (self._density[min(entry.uses, 4)][age], entry.visit.time, -entry.key.position)

    def on_insert(self, entry: BlockStats, now: float) -> None:
        """See `Policy`."""
        self._used[entry] = (now, min(entry.uses, 4))
        super().on_insert(entry, now)

    def on_access(self, entry: BlockStats, now: float) -> None:
        """See `Policy`."""
        since, kind = self._used[entry]
        self._hits[kind, self._age(now - since)] += 1
        self._used[entry] = (now, min(entry.uses, 4))
        super().on_access(entry, now)

    def on_remove(self, entry: BlockStats, now: float, *, evicted: bool) -> None:
        """See `Policy`."""
        since, kind = self._used.pop(entry)
        self._evictions[kind, self._age(now - since)] += 1
        self._events += 1
        super().on_remove(entry, now, evicted=evicted)

    def victims(self, now: float) -> Generator[BlockStats]:
        """See `Policy`."""
        if self._events >= min(self.RENEWAL, 64 + len(self._used) // 16):
            self._events = 0
            self._renew()
            self.rescore()
        return super().victims(now)

    def _renew(self) -> None:
        edges = 2 ** (np.arange(self.AGES + 1) / 4) - 1
        widths = np.diff(edges)
        hits = np.cumsum(self._hits[:, ::-1], 1)[:, ::-1]
        events = self._hits + self._evictions
        left = np.cumsum(events[:, ::-1], 1)[:, ::-1]
        lifetime = np.cumsum((left * widths)[:, ::-1], 1)[:, ::-1]
        self._density = ((hits + 0.1 / edges[1:]) / (lifetime + 1.0)).tolist()
        self._hits *= self.DECAY
        self._evictions *= self.DECAY


class _Queues:
    """What ARC and S3-FIFO share: where each entry is, and which are leaves."""

    def __init__(self) -> None:
        self._leaves: set[BlockStats] = set()

    def on_shield(self, entry: BlockStats) -> None:
        """See `Policy`."""
        self._leaves.discard(entry)

    def on_expose(self, entry: BlockStats, now: float) -> None:
        """See `Policy`."""
        self._leaves.add(entry)

    def rank(self, entry: BlockStats, now: float) -> Score:
        """None: queues only."""
        return ()

    def check_integrity(self, entries: set[BlockStats], leaves: set[BlockStats]) -> None:
        """See `Policy`."""
        if self._leaves != leaves:
            raise InternalError(f"{len(self._leaves)} leaves, {len(leaves)} in the tier")


class S3FIFO(_Queues):
    """Three static queues (Yang et al., SOSP 2023): a small FIFO of a tenth, a main FIFO with reinsertion, a ghost."""

    name = "s3fifo"

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._small: OrderedDict[BlockStats, int] = OrderedDict()
        self._main: OrderedDict[BlockStats, int] = OrderedDict()
        self._ghost: OrderedDict[EntryId, None] = OrderedDict()
        self._capacity = capacity

    def on_insert(self, entry: BlockStats, now: float) -> None:
        """See `Policy`."""
        self._leaves.add(entry)
        queue = self._main if self._ghost.pop(entry.key.id, self) is None else self._small
        queue[entry] = 0

    def on_access(self, entry: BlockStats, now: float) -> None:
        """See `Policy`."""
        queue = self._small if entry in self._small else self._main
        queue[entry] = min(queue[entry] + 1, 3)

    def on_remove(self, entry: BlockStats, now: float, *, evicted: bool) -> None:
        """See `Policy`."""
        self._leaves.discard(entry)
        if self._small.pop(entry, None) is not None:
            self._ghost[entry.key.id] = None
            if len(self._ghost) > self._capacity:
                self._ghost.popitem(last=False)
        else:
            self._main.pop(entry)

    def victims(self, now: float) -> Generator[BlockStats]:
        """See `Policy`."""
        passed = 0
        while passed < 5 * (len(self._small) + len(self._main)):
            passed += 1
            if len(self._small) * 10 >= self._capacity or not self._main:
                entry, uses = next(iter(self._small.items()))
                queue = self._small
                if uses > 0:
                    del self._small[entry]
                    self._main[entry] = 0
                    continue
                if entry not in self._leaves:
                    queue.move_to_end(entry)
                    continue
            else:
                entry, uses = next(iter(self._main.items()))
                queue = self._main
                if uses > 0 or entry not in self._leaves:
                    queue[entry] = max(uses - 1, 0)
                    queue.move_to_end(entry)
                    continue
            yield entry
            if entry in queue:  # in use
                queue.move_to_end(entry)


class ARC(_Queues):
    """Adaptive replacement (Megiddo and Modha, FAST 2003): a list of entries used once and one of those used more
    often, their sizes steered by which list's ghosts are asked for."""

    name = "arc"

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._once: OrderedDict[BlockStats, None] = OrderedDict()
        self._often: OrderedDict[BlockStats, None] = OrderedDict()
        self._ghosts: tuple[OrderedDict[EntryId, None], OrderedDict[EntryId, None]] = (OrderedDict(), OrderedDict())
        self._capacity = capacity
        self._target = 0.0

    def on_insert(self, entry: BlockStats, now: float) -> None:
        """See `Policy`."""
        self._leaves.add(entry)
        once, often = self._ghosts
        if entry.key.id in once:
            self._target = min(self._capacity, self._target + max(1.0, len(often) / len(once)))
            del once[entry.key.id]
            self._often[entry] = None
        elif entry.key.id in often:
            self._target = max(0.0, self._target - max(1.0, len(once) / len(often)))
            del often[entry.key.id]
            self._often[entry] = None
        else:
            self._once[entry] = None

    def on_access(self, entry: BlockStats, now: float) -> None:
        """See `Policy`."""
        self._once.pop(entry, None)
        self._often[entry] = None
        self._often.move_to_end(entry)

    def on_remove(self, entry: BlockStats, now: float, *, evicted: bool) -> None:
        """See `Policy`."""
        self._leaves.discard(entry)
        which = int(entry in self._often)
        del (self._once, self._often)[which][entry]
        ghosts = self._ghosts[which]
        ghosts[entry.key.id] = None
        if len(ghosts) > self._capacity:
            ghosts.popitem(last=False)

    def victims(self, now: float) -> Generator[BlockStats]:
        """See `Policy`."""
        passed = 0
        while passed < 2 * (len(self._once) + len(self._often)):
            passed += 1
            queue = self._once if self._once and (len(self._once) > self._target or not self._often) else self._often
            entry = next(iter(queue))
            if entry in self._leaves:
                yield entry
            if entry in queue:
                queue.move_to_end(entry)
