"""A tier in memory: one preallocated buffer, entries as contiguous extents of it.

Invariants, checked by `check_integrity`: extents and free runs cover the buffer without overlap; an entry that is
pinned (viewed), being filled or being moved is neither freed nor moved by anybody else; `drop` takes an entry out of
sight at once and frees it with the last pin.

All of the buffer can be used whatever came and went: where no run is long enough for an entry but the free bytes
suffice, extents that nobody pins are moved first (`extents.plan_relocation`). `defragment` does that ahead of need
(`kv.defragmenter`). Copies run outside the lock; what takes part in one is marked, and only who wants that very entry
waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from python_backends.errors import EntryLostError, InternalError, TierFullError, TierIoError
from python_backends.kv.blocks import EntryId, EntryKey, Tier
from python_backends.kv.tiers.base import TierStats, WriteFailure, read_each, write_each
from python_backends.kv.tiers.extents import FreeRuns, Relocation, plan_relocation, spans_of
from python_backends.kv.tiers.memory import Memory, plain_memory

SMALL_ALIGNMENT, PAGE = 64, 4096
USABLE_SHARE = 0.95
"""What alignment leaves of the buffer where entries are at least 20 alignments long (see `alignment_for`)."""

State = Literal["filling", "held", "moving", "gone"]


def alignment_for(smallest_bytes: int) -> int:
    """Pages, so that direct I/O needs no copy, unless the smallest entries would waste 5 % by it."""
    return PAGE if smallest_bytes >= 20 * PAGE else SMALL_ALIGNMENT


@dataclass(eq=False, slots=True)
class _Extent:
    key: EntryKey
    start: int
    size: int
    state: State = "filling"
    pins: int = 0


@dataclass(slots=True)
class _Counters:
    writes: int = 0
    written_bytes: int = 0
    reads: int = 0
    read_bytes: int = 0
    relocations: int = 0
    moved_bytes: int = 0
    failures: dict[str, int] = field(default_factory=dict)

    def fail(self, reason: str) -> None:
        self.failures[reason] = self.failures.get(reason, 0) + 1


class Arena:
    """`MemoryStore` for the device and the host tier.

    Args:
        name: which tier.
        limit_bytes: size of the buffer; only touched pages of plain memory are resident.
        alignment: of every entry, a power of two; see `alignment_for`.
        allocate: where the buffer comes from (`memory.plain_memory`, `memory.pinned_memory`).
    """

    def __init__(
        self,
        name: Tier,
        limit_bytes: int,
        *,
        alignment: int = PAGE,
        allocate: Callable[[int], Memory] = plain_memory,
    ) -> None:
        self.name: Tier = name
        self.limit_bytes = limit_bytes // alignment * alignment
        self.usable_bytes = int(self.limit_bytes * USABLE_SHARE)
        self.memory = allocate(max(alignment, self.limit_bytes))
        self._alignment = alignment
        self._buffer = self.memory.array.data
        self._free = FreeRuns(self.limit_bytes)
        self._by_id: dict[EntryId, _Extent] = {}
        self._dropped: set[_Extent] = set()  # out of sight, but pinned, filled or moved
        self._live_bytes = 0
        self._counters = _Counters()
        self._changed = threading.Condition()
        self._relocating = threading.Lock()
        self._closed = False

    # -- writing -----------------------------------------------------------------------------------------------------
    def write(self, key: EntryKey, payload: memoryview) -> None:
        """See `TierStore.write`."""
        if self.contains(key):
            return
        with self.fill(key) as room:
            np.copyto(np.frombuffer(room, np.uint8), np.frombuffer(payload, np.uint8))

    def write_many(self, items: Sequence[tuple[EntryKey, memoryview]]) -> list[WriteFailure | None]:
        """See `TierStore.write_many`."""
        return write_each(self.write, items)

    @contextmanager
    def fill(self, key: EntryKey) -> Iterator[memoryview]:
        """See `MemoryStore.fill`."""
        extent = self._acquire(key)
        try:
            yield self._buffer[extent.start : extent.start + key.num_bytes]
        except BaseException:
            with self._changed:
                self._forget(extent)
                self._settle(extent, "gone")
            raise
        with self._changed:
            self._settle(extent, "held")
            self._counters.writes += 1
            self._counters.written_bytes += key.num_bytes

    def disown(self, key: EntryKey) -> None:
        """See `MemoryStore.disown`."""
        with self._changed:
            extent = self._by_id.get(key.id)
            if extent is not None and extent.state == "filling":
                self._forget(extent)

    # -- reading -----------------------------------------------------------------------------------------------------
    def read(self, key: EntryKey, into: memoryview) -> None:
        """See `TierStore.read`."""
        with self.view(key) as payload:
            np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(payload, np.uint8))

    def read_many(self, items: Sequence[tuple[EntryKey, memoryview]]) -> list[EntryLostError | None]:
        """See `TierStore.read_many`."""
        return read_each(self.read, items)

    @contextmanager
    def view(self, key: EntryKey) -> Iterator[memoryview]:
        """See `MemoryStore.view`."""
        extent = self._pin(key)
        try:
            yield self._buffer[extent.start : extent.start + key.num_bytes].toreadonly()
        finally:
            with self._changed:
                extent.pins -= 1
                self._settle(extent, extent.state)

    def _pin(self, key: EntryKey) -> _Extent:
        with self._changed:
            while (extent := self._by_id.get(key.id)) is not None and extent.state == "moving":
                self._changed.wait()
            if extent is None or extent.state != "held" or extent.key != key:
                reason = "closed" if self._closed else "missing" if extent is None or extent.key == key else "identity"
                self._counters.fail(reason)
                raise EntryLostError(
                    f"the {self.name} tier does not hold a {key.kind} of {key.position} tokens", reason
                )
            extent.pins += 1
            self._counters.reads += 1
            self._counters.read_bytes += key.num_bytes
            return extent

    # -- freeing -----------------------------------------------------------------------------------------------------
    def drop(self, key: EntryKey) -> None:
        """See `TierStore.drop`."""
        with self._changed:
            extent = self._by_id.get(key.id)
            if extent is not None:
                self._forget(extent)
                self._settle(extent, extent.state)

    def erase(self, keys: Iterable[EntryKey]) -> None:
        """Drop entries and overwrite them with zeros, unless somebody is reading them: then they only go."""
        for key in keys:
            with self._changed:
                while (extent := self._by_id.get(key.id)) is not None and extent.state == "moving":
                    self._changed.wait()
                if extent is None:
                    continue
                if extent.state == "held" and not extent.pins:
                    self.memory.array[extent.start : extent.start + extent.size] = 0
                self._forget(extent)
                self._settle(extent, extent.state)

    def _forget(self, extent: _Extent) -> None:
        """Out of sight; `_settle` frees it once nothing is going on with it. Under the lock."""
        if self._by_id.get(extent.key.id) is extent:
            del self._by_id[extent.key.id]
            self._dropped.add(extent)
            self._live_bytes -= extent.key.num_bytes

    def _settle(self, extent: _Extent, state: State) -> None:
        """Enter ``state``, and free the extent where it was dropped and nobody uses it any more. Under the lock."""
        extent.state = state
        if extent in self._dropped and not extent.pins and state in ("held", "gone"):
            self._dropped.discard(extent)
            extent.state = "gone"
            self._free.release(extent.start, extent.size)
        self._changed.notify_all()

    # -- room --------------------------------------------------------------------------------------------------------
    def _acquire(self, key: EntryKey) -> _Extent:
        size = -(-key.num_bytes // self._alignment) * self._alignment
        extent = self._try_acquire(key, size)
        if extent is not None:
            return extent
        with self._relocating:  # one at a time: another thread's relocation holds free bytes that soon are back
            while (extent := self._try_acquire(key, size)) is None:
                if not self._relocate(size):
                    with self._changed:
                        self._counters.fail("room")
                    raise TierFullError(f"the {self.name} tier has no room for {key.num_bytes} bytes", "room")
        return extent

    def _try_acquire(self, key: EntryKey, size: int) -> _Extent | None:
        with self._changed:
            if self._closed:
                raise TierIoError(f"the {self.name} tier is closed", "closed")
            if key.id in self._by_id:
                raise InternalError(f"the {self.name} tier holds or is filling this {key.kind} already")
            # Behind its parent, so that a prompt's blocks lie in one piece and leave in one copy.
            parent = self._by_id.get(key.parent)
            if parent is not None and parent.size == size and self._free.acquire_at(parent.start + size, size):
                start: int | None = parent.start + size
            else:
                start = self._free.acquire(size, high=key.kind == "tail")
            if start is None:
                return None
            extent = _Extent(key, start, size)
            self._by_id[key.id] = extent
            self._live_bytes += key.num_bytes
            return extent

    def defragment(self, run_bytes: int, most_bytes: int) -> int:
        """See `MemoryStore.defragment`."""
        with self._relocating:
            with self._changed:
                if self._free.largest >= run_bytes or self._closed:
                    return 0
            before = self._counters.moved_bytes
            self._relocate(run_bytes, most_bytes)
            return self._counters.moved_bytes - before

    def _relocate(self, size: int, most_bytes: int | None = None) -> bool:
        """Move extents so that ``size`` bytes are free in one piece; False where that cannot be."""
        with self._changed:
            if self._free.total < size:
                return False
            extents = [*self._by_id.values(), *self._dropped]
            spans = spans_of([(e.start, e.size, e.state == "held" and not e.pins) for e in extents], self._free)
            plan = plan_relocation(spans, size)
            if plan is None or (most_bytes is not None and plan.moved_bytes > most_bytes):
                return False
            self._begin(plan, extents)
        for number, start in plan.moves:
            extent = extents[number]
            np.copyto(self._array(start, extent.size), self._array(extent.start, extent.size))
        with self._changed:
            self._finish(plan, extents)
        return True

    def _begin(self, plan: Relocation, extents: Sequence[_Extent]) -> None:
        """Mark what moves, and take the free bytes that it passes through or goes to. Under the lock."""
        for number, start in plan.moves:
            extents[number].state = "moving"
            if not plan.begin <= start < plan.end:
                self._free.take(start, extents[number].size)
        for start, size in self._free.runs():
            if plan.begin <= start < plan.end:
                self._free.take(start, size)

    def _finish(self, plan: Relocation, extents: Sequence[_Extent]) -> None:
        """Enter the new places and free what they left. Under the lock."""
        self._free.release(plan.start, plan.end - plan.start)
        for number, start in plan.moves:
            extents[number].start = start
            self._settle(extents[number], "held")
        self._counters.relocations += 1
        self._counters.moved_bytes += plan.moved_bytes

    def _array(self, start: int, size: int) -> NDArray[np.uint8]:
        return self.memory.array[start : start + size]

    # -- state -------------------------------------------------------------------------------------------------------
    def contains(self, key: EntryKey) -> bool:
        """See `TierStore.contains`; not while it is being filled."""
        with self._changed:
            extent = self._by_id.get(key.id)
            return extent is not None and extent.state != "filling"

    def entries(self) -> Iterator[EntryKey]:
        """See `TierStore.entries`."""
        with self._changed:
            return iter([extent.key for extent in self._by_id.values() if extent.state != "filling"])

    def take_lost(self) -> list[EntryKey]:
        """Memory loses nothing."""
        return []

    def stats(self) -> TierStats:
        """See `TierStore.stats`."""
        with self._changed:
            counters = self._counters
            return TierStats(
                limit_bytes=self.limit_bytes,
                usable_bytes=self.usable_bytes,
                used_bytes=self.limit_bytes - self._free.total,
                live_bytes=self._live_bytes,
                entries=len(self._by_id),
                largest_free_bytes=self._free.largest,
                pressure=self._live_bytes / max(1, self.usable_bytes),
                writes=counters.writes,
                written_bytes=counters.written_bytes,
                reads=counters.reads,
                read_bytes=counters.read_bytes,
                failures=dict(counters.failures),
                details={
                    "relocations": counters.relocations,
                    "moved_bytes": counters.moved_bytes,
                    "pinned": sum(extent.pins > 0 for extent in (*self._by_id.values(), *self._dropped)),
                },
            )

    def check_integrity(self) -> None:
        """Raises InternalError where extents, free runs and counters disagree. Relocations may not be under way."""
        with self._changed:
            self._free.check_integrity()
            extents = [*self._by_id.values(), *self._dropped]
            parts = sorted([*self._free.runs(), *((extent.start, extent.size) for extent in extents)])
            ends = [0, *(start + size for start, size in parts)]
            if [start for start, _ in parts] != ends[:-1] or ends[-1] != self.limit_bytes:
                raise InternalError(f"extents and free runs do not cover the {self.name} arena exactly")
            if self._live_bytes != sum(extent.key.num_bytes for extent in self._by_id.values()):
                raise InternalError(f"live bytes of the {self.name} arena are miscounted")
            if any(extent.pins < 0 or extent.state in ("moving", "gone") for extent in extents):
                raise InternalError(f"an extent of the {self.name} arena is in a state that cannot last")
            if any(extent.pins == 0 and extent.state == "held" for extent in self._dropped):
                raise InternalError(f"a dropped extent of the {self.name} arena was never freed")

    def close(self) -> None:
        """See `TierStore.close`. Memory that somebody still uses stays."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            for extent in list(self._by_id.values()):
                self._forget(extent)
                self._settle(extent, extent.state)
            in_use = self._free.total != self.limit_bytes
        if in_use:  # a thread is stuck in a view or a fill; the process keeps the memory rather than pull it away
            return
        self.memory.release()
