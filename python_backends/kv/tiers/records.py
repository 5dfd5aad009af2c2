"""The form of a segment file: one superblock, then records, everything on page boundaries.

A record is a header page and its payload, padded to pages, so that direct I/O takes both from where they lie. A header
names its entry in full, its own place (segment nonce and offset, so that stale or misplaced pages are never taken for
records) and the digests of payload and header. A *dead* header keeps only the length, for whoever walks the file;
*cleared* means that the payload's bytes are gone too.
Numbers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from python_backends.kv.blocks import EntryKey, EntryKind
from python_backends.kv.tiers.checksum import ALGORITHMS, DIGEST_BYTES, FASTEST

PAGE = 4096
FORMAT_VERSION = 1

# magic, format version, kind, algorithm, then …
_START = struct.Struct("<8sHBB")
# offset, stored bytes, num_bytes, position, id, parent, salt, fingerprint, nonce, digest of the payload
_RECORD = struct.Struct("<QQQQ32s32s32s32s16s16s")
# number, size of the segment, seconds since 1970 at its making, fingerprint, nonce
_SUPERBLOCK = struct.Struct("<QQd32s16s")
_RECORD_MAGIC, _SUPERBLOCK_MAGIC = b"WiCoreKV", b"WiCoreSG"
_KINDS: dict[EntryKind, int] = {"block": 1, "tail": 2}
_NAMES: dict[int, EntryKind] = {1: "block", 2: "tail"}
_DEAD, _CLEARED = 3, 4
_NOTHING = bytes(32)


class BadPageError(Exception):
    """A page is not what it should be; ``reason`` is the word for the counters. Never leaves the store."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def pages(num_bytes: int) -> int:
    """``num_bytes`` rounded up to pages."""
    return -(-num_bytes // PAGE) * PAGE


def record_bytes(stored_bytes: int) -> int:
    """Length of a record in the file."""
    return PAGE + pages(stored_bytes)


@dataclass(frozen=True, slots=True)
class Superblock:
    """First page of a segment."""

    number: int
    """Rises with every segment of the folder."""
    size: int
    """Bytes of the file while it is appended to; shorter once it is sealed."""
    created: float
    """Seconds since 1970."""
    fingerprint: bytes
    """32 bytes: model, dtype, layout and precision. Segments of another one hold nothing for us."""
    nonce: bytes
    """16 random bytes."""

    def encode(self) -> bytes:
        """One page."""
        body = _SUPERBLOCK.pack(self.number, self.size, self.created, self.fingerprint, self.nonce)
        return _page(_START.pack(_SUPERBLOCK_MAGIC, FORMAT_VERSION, 0, FASTEST) + body, FASTEST)

    @staticmethod
    def decode(page: bytes | memoryview) -> Superblock:
        """Raises BadPageError ("superblock"; "version": written by another version of this format)."""
        magic, version, _, algorithm = _START.unpack_from(page)
        if magic == _SUPERBLOCK_MAGIC and (version != FORMAT_VERSION or algorithm not in ALGORITHMS):
            raise BadPageError("version")
        if magic != _SUPERBLOCK_MAGIC or not _intact(page, _SUPERBLOCK.size, algorithm):
            raise BadPageError("superblock")
        return Superblock(*_SUPERBLOCK.unpack_from(page, _START.size))


@dataclass(frozen=True, slots=True)
class Header:
    """First page of a record. ``key`` is None in a dead one, which has only a length."""

    offset: int
    stored_bytes: int
    key: EntryKey | None
    fingerprint: bytes = _NOTHING
    nonce: bytes = bytes(16)
    digest: bytes = bytes(DIGEST_BYTES)
    """Of the stored payload."""
    algorithm: int = FASTEST
    cleared: bool = False
    """Of a dead one: nothing of the payload is left."""

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.offset + record_bytes(self.stored_bytes)

    def encode(self) -> bytes:
        """One page."""
        key = self.key or EntryKey(_NOTHING, "block", _NOTHING, 0, 0, _NOTHING)
        kind = _KINDS[key.kind] if self.key else _CLEARED if self.cleared else _DEAD
        body = _RECORD.pack(
            self.offset, self.stored_bytes, key.num_bytes, key.position, key.id, key.parent, key.salt,
            self.fingerprint, self.nonce, self.digest,
        )  # fmt: skip
        return _page(_START.pack(_RECORD_MAGIC, FORMAT_VERSION, kind, self.algorithm) + body, self.algorithm)

    @staticmethod
    def decode(page: bytes | memoryview, offset: int, superblock: Superblock) -> Header:
        """Raises BadPageError ("header": damaged, or no header at all; "identity": intact, but of another place)."""
        magic, version, kind, algorithm = _START.unpack_from(page)
        known = magic == _RECORD_MAGIC and version == FORMAT_VERSION and algorithm in ALGORITHMS
        if not known or not _intact(page, _RECORD.size, algorithm):
            raise BadPageError("header")
        at, stored, num_bytes, position, *names, digest = _RECORD.unpack_from(page, _START.size)
        id_, parent, salt, fingerprint, nonce = names
        if at != offset or nonce != superblock.nonce:
            raise BadPageError("identity")
        if kind in (_DEAD, _CLEARED):
            return Header(offset, stored, None, fingerprint, nonce, digest, algorithm, kind == _CLEARED)
        if kind not in _NAMES or fingerprint != superblock.fingerprint:
            raise BadPageError("identity")
        key = EntryKey(id_, _NAMES[kind], parent, position, num_bytes, salt)
        return Header(offset, stored, key, fingerprint, nonce, digest, algorithm)


@dataclass(frozen=True, slots=True)
class Item:
    """A payload on its way into a record."""

    key: EntryKey
    stored: memoryview
    digest: bytes
    algorithm: int = FASTEST


def dead_header(offset: int, end: int, superblock: Superblock, *, cleared: bool = False) -> Header:
    """What is written over records ``[offset, end)`` that are gone: nothing of their entries but the length."""
    return Header(offset, end - offset - PAGE, None, nonce=superblock.nonce, cleared=cleared)


def _page(content: bytes, algorithm: int) -> bytes:
    return (content + ALGORITHMS[algorithm](content)).ljust(PAGE, b"\0")


def _intact(page: bytes | memoryview, body_bytes: int, algorithm: int) -> bool:
    end = _START.size + body_bytes
    return bool(ALGORITHMS[algorithm](page[:end]) == bytes(page[end : end + DIGEST_BYTES]))
