"""One file of the log: made at full size, appended to, sealed by cutting it to what was written, scanned at start."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from python_backends.errors import ConfigError, InternalError
from python_backends.kv.tiers.checksum import ALGORITHMS
from python_backends.kv.tiers.files import SegmentFile, Staging
from python_backends.kv.tiers.records import PAGE, BadPageError, Header, Superblock, dead_header, pages, record_bytes

MIB = 2**20
SUFFIX, UNFINISHED = ".segment", ".tmp"
OpenFile = Callable[..., SegmentFile]
"""`SegmentFile`, or a subclass whose medium misbehaves."""
_SEARCH_BYTES = 1 << 20


@dataclass(eq=False, slots=True)
class Record:
    """A record and where it is."""

    segment: Segment
    header: Header
    readers: int = 0
    """While positive, its bytes stay as they are."""

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return record_bytes(self.header.stored_bytes)


@dataclass(eq=False, slots=True)
class Segment:
    """Books of one file. Invariant: ``live_bytes`` is the sum over ``live``; records end before ``end``."""

    superblock: Superblock
    file: SegmentFile
    end: int = PAGE
    """Where the next record would begin."""
    sealed: bool = False
    live: dict[int, Record] = field(default_factory=dict)
    """Records that are held, by offset."""
    live_bytes: int = 0
    dead: list[Header] = field(default_factory=list)
    """Records that are marked dead in the file, their payloads not cleared."""
    readers: int = 0
    removed: bool = False

    @property
    def garbage_share(self) -> float:
        """Of the bytes the file may take, what collecting it would give back."""
        return 1 - (self.live_bytes + PAGE) / self.superblock.size

    def add(self, record: Record) -> None:
        """Count a record as held."""
        self.live[record.header.offset] = record
        self.live_bytes += record.num_bytes

    def discard(self, record: Record) -> None:
        """Not held any more."""
        del self.live[record.header.offset]
        self.live_bytes -= record.num_bytes

    def mark_dead(self, record: Record) -> None:
        """Take an entry's name off the medium. Raises OSError."""
        header = dead_header(record.header.offset, record.header.end, self.superblock)
        self.file.write(header.offset, [Staging().page(header.encode())])
        self.dead.append(header)

    def clear_dead(self) -> None:
        """Take the payloads of dead records off the medium too, neighbours in one piece. Raises OSError."""
        self.dead.sort(key=lambda header: header.offset)
        while self.dead:
            first, count = self.dead[0], 1
            while count < len(self.dead) and self.dead[count - 1].end == self.dead[count].offset:
                count += 1
            end = self.dead[count - 1].end
            # The length first, so that a walk of the file finds its way whenever it stops.
            for cleared in (False, True):
                header = dead_header(first.offset, end, self.superblock, cleared=cleared)
                self.file.write(header.offset, [Staging().page(header.encode())])
                if not cleared and end > first.offset + PAGE:
                    self.file.clear(first.offset + PAGE, end - first.offset - PAGE)
            del self.dead[:count]

    def check_integrity(self) -> None:
        """Raises InternalError where records overlap, leave the file or are miscounted."""
        records = sorted(self.live.values(), key=lambda record: record.header.offset)
        ends = [PAGE, *(record.header.end for record in records)]
        apart = all(record.header.offset >= end for record, end in zip(records, ends, strict=False))
        if not apart or ends[-1] > self.end:
            raise InternalError(f"records of segment {self.superblock.number} of the NVMe tier overlap or leave it")
        if self.live_bytes != sum(record.num_bytes for record in records):
            raise InternalError(f"live bytes of segment {self.superblock.number} of the NVMe tier are miscounted")

    def seal(self) -> None:
        """No more appends; what was reserved and not used goes back to the disk."""
        self.sealed = True
        with contextlib.suppress(OSError):  # the room stays reserved until the next start
            self.file.truncate(self.end)


@dataclass
class Scan:
    """What was found in a file at start."""

    headers: list[Header] = field(default_factory=list)
    damage: dict[str, int] = field(default_factory=dict)

    def count(self, reason: str) -> None:
        """One more of that damage."""
        self.damage[reason] = self.damage.get(reason, 0) + 1


def segment_path(folder: Path, number: int) -> Path:
    """Where a segment lies."""
    return folder / f"{number:016x}{SUFFIX}"


def create_segment(folder: Path, superblock: Superblock, *, direct: bool, open_file: OpenFile) -> Segment:
    """A new file under its final name, with all its bytes reserved. Raises OSError, with nothing left behind."""
    path = segment_path(folder, superblock.number)
    unfinished = path.with_suffix(UNFINISHED)
    file = open_file(unfinished, direct=direct, create=True)
    try:
        file.allocate(superblock.size)
        file.write(0, [Staging().page(superblock.encode())])
        os.rename(unfinished, path)  # not waited for: after a power cut it is a damaged file more, and a cold cache
    except OSError:
        file.close()
        for name in (unfinished, path):
            with contextlib.suppress(OSError):
                name.unlink()
        raise
    file.path = path
    return Segment(superblock, file)


def open_segment(path: Path, *, direct: bool, open_file: OpenFile) -> Segment:
    """A file that an earlier server left. Raises OSError, and BadPageError ("superblock", "version", "short")."""
    file = open_file(path, direct=direct)
    try:
        superblock = _read_superblock(file)
    except BaseException:
        file.close()
        raise
    return Segment(superblock, file)


def _read_superblock(file: SegmentFile) -> Superblock:
    page = Staging().take(PAGE)
    if file.read(0, [page]) < PAGE:
        raise BadPageError("short")
    superblock = Superblock.decode(page)
    if segment_path(file.path.parent, superblock.number) != file.path:
        raise BadPageError("superblock")
    return superblock


def scan_segment(segment: Segment) -> Scan:
    """Walk a file's headers, cut what is torn off its end, and seal it. Raises OSError.

    Payloads are not read (they are verified when somebody wants them), but for the last ones of a file that was being
    appended to when its server died: writing is in order, so those before the first good one are good.
    """
    scan, page, length = Scan(), Staging().take(PAGE), segment.file.size()
    at = PAGE
    while at + PAGE <= length:
        try:
            header = _read_header(segment, at, page)
        except BadPageError as error:
            found = _next_header(segment, at + PAGE, length)
            if found is not None or any(page):
                scan.count(error.reason if found is not None else "torn")
            if found is None:
                break
            at = found
            continue
        if header.end > length:
            scan.count("short")
            break
        if header.key is not None:
            scan.headers.append(header)
        elif not header.cleared:
            segment.dead.append(header)
        at = header.end
    segment.end = at
    if length == segment.superblock.size:
        _cut_unfinished(segment, scan)
    segment.seal()
    return scan


def _read_header(segment: Segment, at: int, page: memoryview) -> Header:
    if segment.file.read(at, [page]) < PAGE:
        raise BadPageError("short")
    return Header.decode(page, at, segment.superblock)


def _next_header(segment: Segment, at: int, length: int) -> int | None:
    """First page from ``at`` on that holds a good header of this very place."""
    chunk = Staging().take(_SEARCH_BYTES)
    while at + PAGE <= length:
        wanted = min(len(chunk), (length - at) // PAGE * PAGE)
        found = segment.file.read(at, [chunk[:wanted]])
        for start in range(0, found, PAGE):
            with contextlib.suppress(BadPageError):
                Header.decode(chunk[start : start + PAGE], at + start, segment.superblock)
                return at + start
        at += wanted
    return None


def _cut_unfinished(segment: Segment, scan: Scan) -> None:
    staging = Staging()
    while scan.headers:
        header = scan.headers[-1]
        stored = staging.take(pages(header.stored_bytes))
        found = segment.file.read(header.offset + PAGE, [stored]) if len(stored) else 0
        if found == len(stored) and ALGORITHMS[header.algorithm](stored[: header.stored_bytes]) == header.digest:
            return
        scan.count("torn")
        scan.headers.pop()
        segment.end = header.offset
        staging.reset()


def least_limit_for(largest_bytes: int) -> int:
    """Smallest limit with which a log works: four segments of four of the largest entries each."""
    return 4 * (4 * record_bytes(largest_bytes) + PAGE)


def segment_bytes_for(limit_bytes: int, largest_bytes: int) -> int:
    """Size of the segments: 64 MiB or 16 of the largest entries, but at least eight segments where the limit is small.

    Raises ConfigError where the limit is below `least_limit_for`.
    """
    least = least_limit_for(largest_bytes)
    if limit_bytes < least:
        raise ConfigError(
            f"an NVMe tier of {limit_bytes / 1e6:.3g} MB is too small for entries of {largest_bytes / 1e6:.3g} MB; "
            f"give it at least {least / 1e6:.3g} MB or turn it off"
        )
    wanted = max(64 * MIB, 16 * record_bytes(largest_bytes))
    return max(least // 4, min(wanted, limit_bytes // 8)) // PAGE * PAGE
