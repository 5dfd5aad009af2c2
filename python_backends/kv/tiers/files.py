"""Files past the page cache where the file system allows it, read and written where callers' memory lies."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from python_backends.kv.tiers.records import PAGE, pages

_MOST_VECTORS = 1000
"""Buffers of one system call; Linux takes 1024 (IOV_MAX)."""


def probe_direct_io(folder: Path) -> bool:
    """Whether files here can be written and read with O_DIRECT; found out by doing it, since opening proves nothing."""
    path = folder / f"probe-{os.getpid()}.tmp"
    page = mmap.mmap(-1, PAGE)
    page[:8] = os.urandom(8)
    back = mmap.mmap(-1, PAGE)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        try:
            return os.pwrite(fd, page, 0) == PAGE and os.preadv(fd, [back], 0) == PAGE and back[:] == page[:]
        finally:
            os.close(fd)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Make names that were made, changed or removed in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Staging:
    """Page-aligned scratch memory that is kept from one use to the next; pieces live until `reset`."""

    def __init__(self) -> None:
        self._buffer = memoryview(b"")
        self._used = 0

    def reset(self) -> None:
        """All of it may be taken again."""
        self._used = 0

    def take(self, num_bytes: int) -> memoryview:
        """Whole pages, at least ``num_bytes``, with any content."""
        size = pages(num_bytes)
        if self._used + size > len(self._buffer):
            # Pieces of the old buffer stay valid: they hold it.
            self._buffer, self._used = memoryview(mmap.mmap(-1, max(size, 2 * len(self._buffer), 16 * PAGE))), 0
        piece = self._buffer[self._used : self._used + size]
        self._used += size
        return piece

    def page(self, content: bytes) -> memoryview:
        """One page with this content."""
        page = self.take(PAGE)
        page[:] = content
        return page


def is_aligned(buffer: memoryview) -> bool:
    """Whether direct I/O can use it where it lies."""
    return int(np.frombuffer(buffer, np.uint8).ctypes.data) % PAGE == 0


def padded_for_write(payload: memoryview, staging: Staging) -> list[memoryview]:
    """The payload as aligned buffers of whole pages, copied only where it must be."""
    whole = len(payload) // PAGE * PAGE if is_aligned(payload) else 0
    if whole == len(payload):
        return [payload]
    rest = staging.take(len(payload) - whole)
    rest[: len(payload) - whole] = payload[whole:]
    rest[len(payload) - whole :] = bytes(len(rest) - (len(payload) - whole))
    return [payload[:whole], rest] if whole else [rest]


class PaddedRead:
    """Aligned buffers of whole pages that fill ``into``; `finish` copies what could not be read in place."""

    def __init__(self, into: memoryview, staging: Staging) -> None:
        whole = len(into) // PAGE * PAGE if is_aligned(into) else 0
        self._rest = into[whole:]
        self._staged = staging.take(len(self._rest)) if len(self._rest) else None
        self.buffers = [buffer for buffer in (into[:whole], self._staged) if buffer is not None and len(buffer)]

    def finish(self) -> None:
        """After the buffers were filled."""
        if self._staged is not None:
            np.copyto(np.frombuffer(self._rest, np.uint8), np.frombuffer(self._staged, np.uint8)[: len(self._rest)])


class SegmentFile:
    """One open file. All offsets and lengths are whole pages. Raises OSError."""

    def __init__(self, path: Path, *, direct: bool, create: bool = False) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        self.path = path
        self._fd = os.open(path, flags | (os.O_CREAT | os.O_EXCL if create else 0), 0o600)

    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._fd).st_size

    def allocate(self, size: int) -> None:
        """Reserve the bytes on the disk, so that later writes cannot find it full."""
        os.posix_fallocate(self._fd, 0, size)

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """All of the buffers, one behind the other, in as few calls as possible."""
        for first in range(0, len(buffers), _MOST_VECTORS):
            part = list(buffers[first : first + _MOST_VECTORS])
            while part:
                done = os.pwritev(self._fd, part, offset)
                if done <= 0 or done % PAGE:
                    raise OSError(errno.EIO, f"only {done} bytes were written", str(self.path))
                offset += done
                part = _behind(part, done)

    def read(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers; returns the bytes read, fewer only where the file ends."""
        total = 0
        for first in range(0, len(buffers), _MOST_VECTORS):
            part = list(buffers[first : first + _MOST_VECTORS])
            while part:
                done = os.preadv(self._fd, part, offset + total)
                total += done
                if done <= 0 or done % PAGE:
                    return total
                part = _behind(part, done)
        return total

    def clear(self, offset: int, size: int) -> None:
        """Zeros there: given back to the file system where it can do that, else written."""
        if not _punch_hole(self._fd, offset, size):
            zeros = memoryview(mmap.mmap(-1, min(size, 1 << 20)))
            for at in range(offset, offset + size, len(zeros)):
                self.write(at, [zeros[: min(len(zeros), offset + size - at)]])

    def truncate(self, size: int) -> None:
        """Cut the file."""
        os.ftruncate(self._fd, size)

    def sync(self) -> None:
        """Wait until everything written is on the medium."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Nothing may use it afterwards."""
        os.close(self._fd)


def _behind(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What is left of the buffers after ``done`` bytes."""
    while buffers and done >= len(buffers[0]):
        done -= len(buffers.pop(0))
    if buffers and done:
        buffers[0] = buffers[0][done:]
    return buffers


def _punch_hole(fd: int, offset: int, size: int) -> bool:
    """Linux's fallocate(2) with FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, which Python's os does not offer."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return bool(libc.fallocate(fd, 0x02 | 0x01, offset, size) == 0)
