"""Small NVMe stores, and media that misbehave under them."""

import errno
import os
import threading

from python_backends.errors import EntryLostError
from python_backends.kv.blocks import EntryKey
from python_backends.kv.tiers.files import SegmentFile
from python_backends.kv.tiers.nvme import NvmeStore
from tests.python_backends.kv.tiers.payloads import entry, payload, room

BLOCK, TAIL = 3000, 40_000
LIMIT = 2**21
FINGERPRINT = b"a model, its dtype and layout".ljust(32)


def open_store(folder, limit_bytes=LIMIT, **options):
    sizes = {"block_bytes": BLOCK, "largest_bytes": TAIL, "fingerprint": FINGERPRINT, "free_floor_bytes": 0}
    return NvmeStore(folder, limit_bytes, **(sizes | options))


def crash(store):
    """Leave a store as a killed process does: files as they are, the lock given up by the system."""
    os.close(store._folder_lock)


def write(store, *keys):
    return store.write_many([(key, memoryview(payload(key))) for key in keys])


def read(store, key: EntryKey):
    """True: the right bytes came back; otherwise why not. Wrong bytes end the test."""
    into = room(key)
    try:
        store.read(key, into)
    except EntryLostError as error:
        return error.reason
    assert into == payload(key)
    return True


def segments(folder):
    return sorted(folder.glob("*.segment"))


class DiedError(BaseException):
    """The process ends here, in the middle of a write."""


class Medium:
    """Faults for every file opened through `open_file`, switched on and off by the test."""

    def __init__(self):
        self.read_error = self.write_error = self.flip = 0
        self.writes_left = -1
        self.hang = threading.Event()
        self.hang.set()
        self.hung = threading.Semaphore(0)

    def open_file(self, path, **options):
        return _Faulty(self, path, **options)


class _Faulty(SegmentFile):
    def __init__(self, medium, path, **options):
        self._medium = medium
        super().__init__(path, **options)

    def read(self, offset, buffers):
        medium = self._medium
        if not medium.hang.is_set():
            medium.hung.release()
            medium.hang.wait()
        if medium.read_error:
            medium.read_error -= 1
            raise OSError(errno.EIO, "a read that fails")
        found = super().read(offset, buffers)
        if medium.flip:
            medium.flip -= 1
            buffers[-1][0] ^= 4
        return found

    def write(self, offset, buffers):
        medium = self._medium
        medium.writes_left -= 1
        if medium.writes_left == 0:
            super().write(offset, buffers[:-1])
            raise DiedError
        if medium.write_error:
            medium.write_error -= 1
            # As a disk does: a part of it arrived.
            super().write(offset, buffers[:1])
            raise OSError(errno.EIO, "a write that fails")
        super().write(offset, buffers)


def numbered(number):
    """Entry ``number`` of a mix of blocks and tails."""
    return entry(number, *((TAIL, "tail") if number % 17 == 0 else (BLOCK, "block")))
