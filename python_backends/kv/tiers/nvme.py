"""The tier on disk: payloads in a log of checksummed records, bounded, and found again by the next server.

Whatever the medium does (full, failing, hanging, flipping bits, truncated files), a payload that is given back is the
one that was written; everything else is an `EntryLostError` and a count in ``failures``. After repeated failures the
tier leaves the medium alone for a while (`limits.Breaker`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from python_backends.errors import EntryLostError, TierFullError, TierIoError
from python_backends.kv.blocks import EntryKey, Tier
from python_backends.kv.tiers.base import TierStats, WriteFailure
from python_backends.kv.tiers.checksum import ALGORITHMS, FASTEST
from python_backends.kv.tiers.codec import Codec
from python_backends.kv.tiers.files import PaddedRead, SegmentFile, Staging, probe_direct_io
from python_backends.kv.tiers.folder import LogOptions, lock_folder, room_for
from python_backends.kv.tiers.limits import DAY_S, Breaker, Clock, WriteBudget
from python_backends.kv.tiers.log import COPY_SHARE, SegmentLog
from python_backends.kv.tiers.records import PAGE, BadPageError, Header, Item, record_bytes
from python_backends.kv.tiers.segments import OpenFile, Record, least_limit_for, segment_bytes_for

LONGEST_READ = 64 * 2**20
"""Of one system call, unless a single record is larger."""


class NvmeStore:
    """`TierStore` in a folder of its own.

    Args:
        folder: made for this user alone, and locked while the store is open.
        limit_bytes: what the files may take; clipped to what the disk has above the floor.
        fingerprint: model, dtype and layout; entries of another one are not seen, and go first where room is needed.
        block_bytes, largest_bytes: payload of a block, and of the largest tail.
        free_floor_bytes: room on the disk that is left to others.
        write_budget_bytes: a day; None: any number.
        foreign_days: how long files of other models are kept where their room is not needed.
        codec: what is stored in place of payloads; None: themselves, without a copy in between.
        clock, wall: seconds, monotonic and since 1970.
        open_file: how files are opened.

    Raises:
        TierLockedError: another server uses the folder.
        TierIoError: the folder cannot be made or read.
        ConfigError: the limit is too small.
    """

    name: Tier = "nvme"

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        *,
        fingerprint: bytes,
        block_bytes: int,
        largest_bytes: int,
        free_floor_bytes: int = 2**30,
        write_budget_bytes: int | None = None,
        foreign_days: float = 7.0,
        codec: Codec | None = None,
        breaker: Breaker | None = None,
        clock: Clock = time.monotonic,
        wall: Clock = time.time,
        open_file: OpenFile = SegmentFile,
    ) -> None:
        self._codec = codec
        block, largest = (n if codec is None else codec.stored_bytes(n) for n in (block_bytes, largest_bytes))
        largest = max(block, largest)
        segment_bytes_for(limit_bytes, largest)  # refuses a limit that is too small before anything is made
        self._clock = clock
        self._breaker = breaker or Breaker(clock=clock)
        self._closed = False
        self._counters = threading.Lock()
        self._writes = self._written_bytes = self._reads = self._read_bytes = 0
        self._failures: dict[str, int] = {}
        self._local = threading.local()
        try:
            self._folder_lock = lock_folder(folder)
        except OSError as error:
            raise TierIoError(f"{folder} cannot be used for the NVMe tier: {error}", "io") from error
        try:
            room = max(least_limit_for(largest), room_for(folder) - free_floor_bytes)
            self.limit_bytes = min(limit_bytes, room)
            segment_bytes = segment_bytes_for(self.limit_bytes, largest)
            # Every file but two may be full up to the share at which collection still pays.
            payloads = (self.limit_bytes // segment_bytes - 2) * (COPY_SHARE * segment_bytes - 2 * PAGE)
            self.usable_bytes = int(payloads * block_bytes / record_bytes(block))
            self.direct = probe_direct_io(folder)
            self._budget = WriteBudget(write_budget_bytes, folder / "budget.json", clock, wall)
            self._log = SegmentLog(
                LogOptions(
                    folder=folder,
                    limit_bytes=limit_bytes,
                    segment_bytes=segment_bytes,
                    fingerprint=_full_fingerprint(fingerprint, codec),
                    free_floor_bytes=free_floor_bytes,
                    foreign_s=foreign_days * DAY_S,
                    direct=self.direct,
                    open_file=open_file,
                    wall=wall,
                )
            )
        except OSError as error:
            os.close(self._folder_lock)
            raise TierIoError(f"{folder} cannot be used for the NVMe tier: {error}", "io") from error

    # -- writing -----------------------------------------------------------------------------------------------------
    def write(self, key: EntryKey, payload: memoryview) -> None:
        """See `TierStore.write`."""
        (failure,) = self.write_many([(key, payload)])
        if failure is not None:
            raise failure

    def write_many(self, items: Sequence[tuple[EntryKey, memoryview]]) -> list[WriteFailure | None]:
        """See `TierStore.write_many`. One call should bring 8 MiB or more where there is as much to write."""
        results: list[WriteFailure | None] = [None] * len(items)
        waiting = [(at, self._item(*item)) for at, item in enumerate(items) if not self.contains(item[0])]
        while waiting:
            try:
                done = self._append([item for _, item in waiting])
            except (TierFullError, TierIoError) as error:
                for at, _ in waiting:
                    results[at] = error
                self._count(error.reason, len(waiting))
                break
            with self._counters:
                self._writes += done
                self._written_bytes += sum(item.key.num_bytes for _, item in waiting[:done])
            waiting = waiting[done:]
        return results

    def _item(self, key: EntryKey, payload: memoryview) -> Item:
        payload = payload.cast("B")
        if self._codec is not None:
            stored = memoryview(bytearray(self._codec.stored_bytes(key.num_bytes)))
            self._codec.encode(payload, stored)
            payload = stored
        return Item(key, payload, ALGORITHMS[FASTEST](payload))

    def _append(self, items: Sequence[Item]) -> int:
        self._check_open()
        if not self._budget.spend(record_bytes(len(items[0].stored))):
            raise TierFullError("the NVMe tier's write budget of the day is spent", "budget")
        copied = self._log.copied_bytes
        try:
            done = self._log.append(items)
        except OSError as error:
            self._breaker.fail()
            raise TierIoError(f"the NVMe tier could not write: {error}", "io") from error
        finally:
            self._budget.spend(self._log.copied_bytes - copied, force=True)
        self._budget.spend(sum(record_bytes(len(item.stored)) for item in items[1:done]), force=True)
        self._breaker.succeed()
        return done

    def _check_open(self) -> None:
        if self._closed:
            raise TierIoError("the NVMe tier is closed", "closed")
        if self._breaker.paused_s:
            raise TierIoError(f"the NVMe tier rests for {self._breaker.paused_s:.0f} s after I/O errors", "paused")

    # -- reading -----------------------------------------------------------------------------------------------------
    def read(self, key: EntryKey, into: memoryview) -> None:
        """See `TierStore.read`."""
        (failure,) = self.read_many([(key, into)])
        if failure is not None:
            raise failure

    def read_many(self, items: Sequence[tuple[EntryKey, memoryview]]) -> list[EntryLostError | None]:
        """See `TierStore.read_many`: records that lie behind each other are read in one call."""
        results: list[EntryLostError | None] = [None] * len(items)
        wanted: list[tuple[Record, int]] = []
        for at, (key, _) in enumerate(items):
            try:
                wanted.append((self._pin(key), at))
            except EntryLostError as error:
                results[at] = error
                self._count(error.reason)
        try:
            wanted.sort(key=lambda pair: (pair[0].segment.superblock.number, pair[0].header.offset))
            for run in _runs(wanted):
                self._read_run([(record, items[at][1].cast("B"), at) for record, at in run], results)
        finally:
            for record, _ in wanted:
                self._log.unpin(record)
        return results

    def _pin(self, key: EntryKey) -> Record:
        if self._closed:
            raise EntryLostError("the NVMe tier is closed", "closed")
        if self._breaker.paused_s:
            raise EntryLostError("the NVMe tier rests after I/O errors", "paused")
        record = self._log.pin(key)
        if record is None:
            raise EntryLostError(f"the NVMe tier does not hold a {key.kind} of {key.position} tokens", "missing")
        if record.header.key != key:
            self._log.unpin(record)
            raise EntryLostError("the NVMe tier holds another entry under this id", "identity")
        return record

    def _read_run(self, run: Sequence[tuple[Record, memoryview, int]], results: list[EntryLostError | None]) -> None:
        """Read records that lie behind each other and verify each; failures go into ``results``."""
        staging = self._staging()
        first = run[0][0]
        buffers, pieces = [], []
        for record, into, _ in run:
            page = staging.take(PAGE)
            target = into if self._codec is None else staging.take(record.header.stored_bytes)
            padded = PaddedRead(target[: record.header.stored_bytes], staging)
            buffers += [page, *padded.buffers]
            pieces.append((page, padded, target[: record.header.stored_bytes]))
        try:
            found = first.segment.file.read(first.header.offset, buffers)
        except OSError as error:
            self._breaker.fail()
            if len(run) > 1:  # one bad sector takes its own record only
                for one in run:
                    self._read_run([one], results)
                return
            self._lose(run[0], results, "io", error)
            return
        self._breaker.succeed()
        for (record, into, at), (page, padded, stored) in zip(run, pieces, strict=True):
            reason = "short" if record.header.end - first.header.offset > found else ""
            if not reason:
                padded.finish()
                reason = _fault(record, page, stored)
            if reason:
                self._lose((record, into, at), results, reason)
                continue
            if self._codec is not None:
                self._codec.decode(stored, into)
            with self._counters:
                self._reads += 1
                self._read_bytes += len(into)

    def _lose(
        self,
        failed: tuple[Record, memoryview, int],
        results: list[EntryLostError | None],
        reason: str,
        cause: OSError | None = None,
    ) -> None:
        record, _, at = failed
        key = record.header.key
        assert key is not None
        self._log.forget_record(record)
        self._count(reason)
        text = f"a {key.kind} of {key.position} tokens could not be read from the NVMe tier ({cause or reason})"
        results[at] = EntryLostError(text, reason)

    def _staging(self) -> Staging:
        """Scratch memory of this thread; one that hangs in a read keeps its own."""
        if not hasattr(self._local, "staging"):
            self._local.staging = Staging()
        staging: Staging = self._local.staging
        staging.reset()
        return staging

    # -- dropping ----------------------------------------------------------------------------------------------------
    def drop(self, key: EntryKey) -> None:
        """See `TierStore.drop`. Cheap; the file learns of it with a later write, and a crash before brings it back."""
        self._log.forget(key)

    def erase(self, keys: Iterable[EntryKey]) -> None:
        """See `TierStore.erase`: headers overwritten, payloads given back to the disk, and both waited for."""
        try:
            self._log.erase(keys)
        except OSError as error:
            self._breaker.fail()
            self._count("erase")
            raise TierIoError(f"entries could not be erased from the NVMe tier: {error}", "io") from error

    # -- state -------------------------------------------------------------------------------------------------------
    def contains(self, key: EntryKey) -> bool:
        """See `TierStore.contains`."""
        return key.id in self._log.index

    def entries(self) -> Iterator[EntryKey]:
        """See `TierStore.entries`."""
        with self._log.lock:
            return iter([record.header.key for record in self._log.index.values() if record.header.key is not None])

    def take_lost(self) -> list[EntryKey]:
        """See `TierStore.take_lost`."""
        with self._log.lock:
            lost, self._log.lost = self._log.lost, []
        return lost

    def _count(self, reason: str, number: int = 1) -> None:
        with self._counters:
            self._failures[reason] = self._failures.get(reason, 0) + number

    def stats(self) -> TierStats:
        """See `TierStore.stats`."""
        log = self._log
        with log.lock:
            live = sum(record.header.key.num_bytes for record in log.index.values() if record.header.key is not None)
            entries, damage = len(log.index), dict(log.damage)
        with self._counters:
            for reason, number in self._failures.items():
                damage[reason] = damage.get(reason, 0) + number
            return TierStats(
                limit_bytes=self.limit_bytes,
                usable_bytes=self.usable_bytes,
                used_bytes=log.disk_bytes,
                live_bytes=live,
                entries=entries,
                largest_free_bytes=max(0, self.limit_bytes - log.reserved_bytes),
                pressure=live / max(1, self.usable_bytes),
                writes=self._writes,
                written_bytes=self._written_bytes,
                reads=self._reads,
                read_bytes=self._read_bytes,
                failures=damage,
                details={
                    "direct_io": int(self.direct),
                    "segments": len(log.segments),
                    "collections": log.collections,
                    "copied_bytes": log.copied_bytes,
                    "budget_left_bytes": self._budget.left_bytes if self._budget.bytes_per_day is not None else -1,
                    "paused_s": self._breaker.paused_s,
                    "pauses": self._breaker.pauses,
                },
            )

    def check_integrity(self) -> None:
        """See `TierStore.check_integrity`."""
        self._log.check_integrity()

    def close(self) -> None:
        """See `TierStore.close`."""
        if self._closed:
            return
        self._closed = True
        self._log.close()
        self._budget.save()
        os.close(self._folder_lock)


def _full_fingerprint(fingerprint: bytes, codec: Codec | None) -> bytes:
    name = codec.name.encode() if codec is not None else b""
    return blake2b(len(fingerprint).to_bytes(8, "little") + fingerprint + name, digest_size=32).digest()


def _fault(record: Record, page: memoryview, stored: memoryview) -> str:
    """What is wrong with a record that was read; "" where nothing is."""
    try:
        found = Header.decode(page, record.header.offset, record.segment.superblock)
    except BadPageError as error:
        return error.reason
    if found != record.header:
        return "identity"
    return "" if ALGORITHMS[found.algorithm](stored) == found.digest else "checksum"


def _runs(wanted: Sequence[tuple[Record, int]]) -> Iterator[list[tuple[Record, int]]]:
    """Groups of records that lie behind each other in one file."""
    run: list[tuple[Record, int]] = []
    for pair in wanted:
        record = pair[0]
        if run and (
            run[-1][0].segment is not record.segment
            or run[-1][0].header.end != record.header.offset
            or record.header.end - run[0][0].header.offset > LONGEST_READ
        ):
            yield run
            run = []
        run.append(pair)
    if run:
        yield run
