"""The segments of one folder as a log: appended to in large pieces, collected, and found again at start.

Two locks. ``_appending`` is held by whoever writes to the medium (appends, collection, burial), for as long as that
takes; ``lock`` guards the books and is never held across I/O, so that readers do not wait for a disk that hangs.
Invariants: every record of ``index`` lies in a segment of ``segments`` and in its ``live``; no two overlap; the files'
full sizes add up to at most the limit. All of one server have the same size, and one is kept back: collection copies
into it before it removes its victim, and so always has somewhere to go.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from python_backends.errors import InternalError, TierFullError
from python_backends.kv.blocks import EntryId, EntryKey
from python_backends.kv.tiers.checksum import ALGORITHMS
from python_backends.kv.tiers.files import Staging, padded_for_write, sync_folder
from python_backends.kv.tiers.folder import LogOptions, recover_folder
from python_backends.kv.tiers.records import PAGE, Header, Item, Superblock, pages, record_bytes
from python_backends.kv.tiers.segments import Record, Segment, create_segment

BATCH_BYTES = 16 * 2**20
"""Of one system call, unless a single record is larger."""
_CLOSE_S = 5.0
COPY_SHARE = 0.75
"""Collection copies a segment's live records where they are at most this share of it."""


class SegmentLog:
    """See the module. Raises OSError where the medium fails, and TierFullError where there is no room."""

    def __init__(self, options: LogOptions) -> None:
        self.options = options
        self.lock = threading.Lock()
        self.index: dict[EntryId, Record] = {}
        self.segments: dict[int, Segment] = {}
        self.lost: list[EntryKey] = []
        self.copied_bytes = 0
        self.collections = 0
        self._appending = threading.Lock()
        self._active: Segment | None = None
        self._buried: deque[Record] = deque()  # not in the index any more, still readable in the file
        self._empty: deque[Segment] = deque()  # sealed, nothing live
        self._staging = Staging()
        recovered = recover_folder(options)
        self._foreign = recovered.foreign
        self._next_number = recovered.next_number
        self.damage = recovered.damage
        for segment, scan in recovered.segments:
            self.segments[segment.superblock.number] = segment
            for header in scan.headers:
                self._enter(Record(segment, header))
        self._empty = deque(segment for segment in self.segments.values() if not segment.live)
        self._reopen_last()
        self._restore_reserve()
        self.lost.clear()

    def _reopen_last(self) -> None:
        """Go on with the newest file: its server may have died while collecting into it, with no other to go to."""
        segment = self.segments.get(max(self.segments, default=-1))
        if segment is None or segment.end + PAGE >= segment.superblock.size:
            return
        with contextlib.suppress(OSError):  # what lay behind the end was cut off, so this adds zeros
            segment.file.allocate(segment.superblock.size)
            segment.sealed = False
            self._active = segment
            if segment in self._empty:
                self._empty.remove(segment)

    def _restore_reserve(self) -> None:
        """Have room for one file more: finish the collection that a crash cut off; beyond that the oldest files go."""
        while not self._fits(self.options.segment_bytes) and (self._foreign or self._empty or self.segments):
            victim, active = self._most_garbage(), self._active
            if self._foreign or self._empty:
                self._make_room()
            elif active and victim and victim.live_bytes <= active.superblock.size - active.end:
                self._collect(victim)
            else:
                self._remove(self.segments[min(self.segments)])

    # -- reading -----------------------------------------------------------------------------------------------------
    def pin(self, key: EntryKey) -> Record | None:
        """Keep a record's bytes as they are; None where there is none."""
        with self.lock:
            record = self.index.get(key.id)
            if record is not None:
                record.readers += 1
                record.segment.readers += 1
            return record

    def unpin(self, record: Record) -> None:
        """Undo `pin`."""
        with self.lock:
            record.readers -= 1
            record.segment.readers -= 1
            self._close_if_unused(record.segment)

    # -- appending ---------------------------------------------------------------------------------------------------
    def append(self, items: Sequence[Item]) -> int:
        """Write as many of the first items as fit in one piece; returns how many, at least one."""
        with self._appending:
            self._tidy(64)
            return self._append(items, collecting=False)

    def _append(self, items: Sequence[Item], *, collecting: bool) -> int:
        segment = self._with_room(record_bytes(len(items[0].stored)), collecting=collecting)
        at, buffers = segment.end, list[memoryview]()
        records: list[Record] = []
        self._staging.reset()
        for item in items:
            size = record_bytes(len(item.stored))
            if at + size > segment.superblock.size or (records and at + size - segment.end > BATCH_BYTES):
                break
            header = Header(
                at, len(item.stored), item.key, self.options.fingerprint, segment.superblock.nonce, item.digest,
                item.algorithm,
            )  # fmt: skip
            buffers.append(self._staging.page(header.encode()))
            buffers += padded_for_write(item.stored, self._staging) if len(item.stored) else []
            records.append(Record(segment, header))
            at = header.end
        try:
            segment.file.write(segment.end, buffers)
        except OSError:  # what is there now is anybody's guess: nothing is written behind it
            self._seal(segment)
            raise
        with self.lock:
            segment.end = at
            for record in records:
                self._enter(record)
        return len(records)

    def _enter(self, record: Record) -> None:
        """Into the index; an older record of the same entry goes. Under the lock."""
        key = record.header.key
        assert key is not None
        old = self.index.get(key.id)
        if old is not None:
            self._leave(old)
        self.index[key.id] = record
        record.segment.add(record)

    def _leave(self, record: Record) -> None:
        """Out of the index; `_tidy` takes it off the disk. Under the lock."""
        key = record.header.key
        assert key is not None
        if self.index.get(key.id) is record:
            del self.index[key.id]
        record.segment.discard(record)
        if not record.segment.live and record.segment.sealed:
            self._empty.append(record.segment)
        else:
            self._buried.append(record)

    def forget(self, key: EntryKey) -> None:
        """Drop an entry; cheap, the disk learns of it with the next append."""
        with self.lock:
            if (record := self.index.get(key.id)) is not None:
                self._leave(record)

    def forget_record(self, record: Record) -> bool:
        """Drop an entry; False where it was dropped or written anew meanwhile."""
        with self.lock:
            key = record.header.key
            if key is None or self.index.get(key.id) is not record:
                return False
            self._leave(record)
            return True

    # -- room --------------------------------------------------------------------------------------------------------
    @property
    def reserved_bytes(self) -> int:
        """What all files may take."""
        own = sum(segment.superblock.size for segment in list(self.segments.values()))
        return own + sum(file.num_bytes for file in list(self._foreign))

    @property
    def disk_bytes(self) -> int:
        """What all files take; holes in them are not taken off."""
        return self.reserved_bytes - sum(s.superblock.size - s.end for s in list(self.segments.values()) if s.sealed)

    def _with_room(self, size: int, *, collecting: bool) -> Segment:
        """The segment to append ``size`` bytes to. Raises TierFullError ("room", "disk")."""
        if size > self.options.segment_bytes - PAGE:
            raise TierFullError(f"{size} bytes are more than a segment takes", "room")
        while True:
            active = self._active
            if active is not None and active.end + size <= active.superblock.size:
                return active
            if active is not None:
                self._seal(active)
            # One segment is kept back, so that collection always has somewhere to copy to.
            wanted = self.options.segment_bytes * (1 if collecting else 2)
            if self._fits(wanted) and self._disk_has(wanted):
                self._active = self._create()
            elif collecting:
                raise TierFullError("the NVMe tier has no segment left to collect into", "room")
            else:
                self._make_room()

    def _fits(self, more_bytes: int) -> bool:
        return self.reserved_bytes + more_bytes <= self.options.limit_bytes

    def _disk_has(self, more_bytes: int) -> bool:
        disk = os.statvfs(self.options.folder)
        return disk.f_bavail * disk.f_frsize >= more_bytes + self.options.free_floor_bytes

    def _create(self) -> Segment:
        options = self.options
        superblock = Superblock(
            self._next_number, options.segment_bytes, options.wall(), options.fingerprint, os.urandom(16)
        )
        self._next_number += 1
        try:
            segment = create_segment(options.folder, superblock, direct=options.direct, open_file=options.open_file)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise TierFullError(f"the disk of {options.folder} is full", "disk") from error
            raise
        with self.lock:
            self.segments[superblock.number] = segment
        return segment

    def _seal(self, segment: Segment) -> None:
        segment.seal()
        self._active = None
        with self.lock:
            if not segment.live:
                self._empty.append(segment)

    def _make_room(self) -> None:
        """Remove a file: an empty or foreign one, else that with the most garbage, its live records copied."""
        if self._empty:
            self._remove_empty()
        elif self._buried and not all(record.readers for record in self._buried):
            # Dropped records that a crash brought back could make the victim's copy outgrow the file it goes to.
            self._tidy(len(self._buried))
        elif self._foreign:
            self._remove_foreign()
        else:
            victim = self._most_garbage()
            if victim is None or not self._disk_has(self.options.segment_bytes):
                if not self._disk_has(2 * self.options.segment_bytes):
                    raise TierFullError(f"the disk of {self.options.folder} has no room above the floor", "disk")
                raise TierFullError("the NVMe tier is full", "room")
            # An earlier server's segments may be smaller than ours, so that removing one did not restore the reserve.
            if self._fits(self.options.segment_bytes):
                self._collect(victim)
            else:
                self._remove(victim)

    def _most_garbage(self) -> Segment | None:
        """The sealed segment that is best collected; None where copying would cost too much for what it gives."""
        shares = [(segment.garbage_share, segment) for segment in self.segments.values() if segment.sealed]
        share, victim = max(shares, key=lambda pair: pair[0], default=(0.0, None))
        return victim if share >= 1 - COPY_SHARE else None

    def _collect(self, victim: Segment) -> None:
        """Copy what is live, verified, and remove the file. A record that turns out damaged is lost."""
        staging = Staging()
        with self.lock:
            records = sorted(victim.live.values(), key=lambda record: record.header.offset)
        for record in records:
            staging.reset()
            header = record.header
            buffer = staging.take(pages(header.stored_bytes))
            try:
                found = victim.file.read(header.offset + PAGE, [buffer]) if len(buffer) else 0
            except OSError:
                self._lose(record, "io")
                continue
            stored = buffer[: header.stored_bytes]
            if found < len(buffer) or ALGORITHMS[header.algorithm](stored) != header.digest:
                self._lose(record, "short" if found < len(buffer) else "checksum")
                continue
            with self.lock:
                key = header.key if victim.live.get(header.offset) is record else None
            if key is not None:  # else it was dropped meanwhile
                self._append([Item(key, stored, header.digest, header.algorithm)], collecting=True)
                self.copied_bytes += record.num_bytes
        self.collections += 1
        self._remove_empty()

    def _lose(self, record: Record, reason: str) -> None:
        if self.forget_record(record) and record.header.key is not None:
            with self.lock:
                self.lost.append(record.header.key)
                self.damage[reason] = self.damage.get(reason, 0) + 1

    # -- taking off the disk -----------------------------------------------------------------------------------------
    def _tidy(self, most: int) -> None:
        """Remove empty files, and overwrite the headers of up to ``most`` records that were dropped.

        A crash before that brings dropped entries back, which harms nobody; what must not come back goes by `erase`.
        """
        self._remove_empty()
        for _ in range(min(most, len(self._buried))):
            record = self._buried.popleft()
            if record.readers:
                self._buried.append(record)
            elif not record.segment.removed:
                with contextlib.suppress(OSError):
                    record.segment.mark_dead(record)

    def _remove_empty(self) -> None:
        while self._empty:
            segment = self._empty.popleft()
            try:
                self._remove(segment)
            except OSError:
                self._empty.append(segment)
                raise

    def _remove_foreign(self) -> None:
        oldest = min(self._foreign, key=lambda file: file.created)
        oldest.path.unlink(missing_ok=True)
        self._foreign.remove(oldest)

    def _remove(self, segment: Segment) -> None:
        """Delete a file; readers keep it open until they are through."""
        if segment.removed:
            return
        if segment is self._active:
            self._active = None
        with contextlib.suppress(FileNotFoundError):
            segment.file.path.unlink()
        with self.lock:
            segment.removed = True
            del self.segments[segment.superblock.number]
            for record in list(segment.live.values()):
                self._leave(record)
                if record.header.key is not None:
                    self.lost.append(record.header.key)
            self._close_if_unused(segment)

    def _close_if_unused(self, segment: Segment) -> None:
        if segment.removed and not segment.readers:
            segment.file.close()

    def erase(self, keys: Iterable[EntryKey]) -> None:
        """Forget entries and wait until nothing of them, and of all dropped before, is left on the medium.

        Where a file refuses, it is removed with everything in it. Raises OSError where that fails too; call it again.
        """
        for key in keys:
            self.forget(key)
        with self._appending:
            self._remove_empty()
            while self._buried:
                record = self._buried[0]
                if not record.segment.removed:
                    self._or_remove(record.segment, partial(record.segment.mark_dead, record))
                self._buried.popleft()
            for segment in [segment for segment in self.segments.values() if segment.dead]:
                self._or_remove(segment, segment.clear_dead)
                if not segment.removed:
                    segment.file.sync()
            sync_folder(self.options.folder)

    def _or_remove(self, segment: Segment, erase: Callable[[], None]) -> None:
        try:
            erase()
        except OSError:
            self._remove(segment)

    def close(self) -> None:
        """Take off the disk what was dropped, and close every file that nobody reads."""
        # A thread that hangs in a write keeps its lock; then the files are left as after a crash.
        if self._appending.acquire(timeout=_CLOSE_S):
            try:
                if self._active is not None:
                    self._seal(self._active)
                with contextlib.suppress(OSError):
                    self._tidy(len(self._buried))
            finally:
                self._appending.release()
        with self.lock:
            for segment in self.segments.values():
                segment.removed = True
                self._close_if_unused(segment)
            self.segments.clear()
            self.index.clear()

    # -- state -------------------------------------------------------------------------------------------------------
    def check_integrity(self) -> None:
        """Raises InternalError where index, segments and files disagree. Nothing may be appended meanwhile."""
        with self._appending, self.lock:
            held = {id(record) for segment in self.segments.values() for record in segment.live.values()}
            if held != {id(record) for record in self.index.values()}:
                raise InternalError("the NVMe tier's index and its segments hold different records")
            for segment in self.segments.values():
                segment.check_integrity()
            if self.reserved_bytes > self.options.limit_bytes:
                raise InternalError("the NVMe tier takes more than its limit")
