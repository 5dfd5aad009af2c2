"""The folder of a log: whose it is, and what earlier servers left in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from python_backends.errors import TierLockedError
from python_backends.kv.tiers.records import BadPageError
from python_backends.kv.tiers.segments import (
    SUFFIX,
    UNFINISHED,
    OpenFile,
    Scan,
    Segment,
    open_segment,
    scan_segment,
)

_SCAN_THREADS = 8


@dataclass(frozen=True)
class LogOptions:
    """What does not change while a log is open."""

    folder: Path
    limit_bytes: int
    segment_bytes: int
    fingerprint: bytes
    free_floor_bytes: int
    foreign_s: float
    direct: bool
    open_file: OpenFile
    wall: Callable[[], float]


def lock_folder(folder: Path) -> int:
    """Make the folder (for this user alone) and lock it; returns the file descriptor that holds the lock.

    Raises TierLockedError where another process has it, OSError where the folder cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(fd, 64, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        raise TierLockedError(
            f"{folder} is in use by another server (process {owner}); give this one a folder of its own"
        ) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd


def room_for(folder: Path) -> int:
    """Bytes on the disk that are free or taken by the tier already."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize + sum(path.stat().st_blocks * 512 for path in folder.glob(f"*{SUFFIX}"))


@dataclass(slots=True)
class Foreign:
    """A file of another model or layout, or one that could not be read: kept until its room is wanted."""

    path: Path
    num_bytes: int
    created: float


@dataclass
class Recovered:
    """What was there at start."""

    segments: list[tuple[Segment, Scan]] = field(default_factory=list)
    """By number, all sealed."""
    foreign: list[Foreign] = field(default_factory=list)
    damage: dict[str, int] = field(default_factory=dict)
    next_number: int = 0


def recover_folder(options: LogOptions) -> Recovered:
    """Read the headers of every segment; remove what was never finished, what is damaged and what has expired."""
    for path in options.folder.glob(f"*{UNFINISHED}"):
        with contextlib.suppress(OSError):
            path.unlink()
    paths = sorted(options.folder.glob(f"*{SUFFIX}"))
    recovered = Recovered()
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        for path, found in zip(paths, pool.map(lambda path: _recover_file(path, options), paths), strict=True):
            damage = found.scan.damage if found.scan is not None else {found.reason: 1} if found.reason else {}
            for reason, number in damage.items():
                recovered.damage[reason] = recovered.damage.get(reason, 0) + number
            if found.segment is not None and found.scan is not None:
                recovered.segments.append((found.segment, found.scan))
            else:
                _set_aside(path, found.created, options, recovered)
    numbers = [int(path.stem, 16) for path in paths if path.stem.isalnum() and len(path.stem) == 16]
    recovered.next_number = max(numbers, default=-1) + 1
    return recovered


@dataclass(frozen=True, slots=True)
class _Found:
    segment: Segment | None = None
    scan: Scan | None = None
    reason: str = ""
    created: float = 0.0
    """Seconds since 1970; 0 for what nobody will want again."""


def _recover_file(path: Path, options: LogOptions) -> _Found:
    try:
        segment = open_segment(path, direct=options.direct, open_file=options.open_file)
    except BadPageError as error:
        # One of another version may be wanted again by the server that wrote it.
        return _Found(reason=error.reason, created=options.wall() if error.reason == "version" else 0.0)
    except OSError:
        return _Found(reason="io", created=options.wall())
    try:
        if segment.superblock.fingerprint == options.fingerprint:
            return _Found(segment, scan_segment(segment))
    except OSError:
        segment.file.close()
        return _Found(reason="io", created=options.wall())
    segment.file.close()
    return _Found(created=segment.superblock.created)


def _set_aside(path: Path, created: float, options: LogOptions, recovered: Recovered) -> None:
    with contextlib.suppress(OSError):
        if options.wall() - created <= options.foreign_s:
            recovered.foreign.append(Foreign(path, path.stat().st_size, created))
            return
        path.unlink()
        recovered.damage["expired"] = recovered.damage.get("expired", 0) + (created > 0)
