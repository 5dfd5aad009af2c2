"""128-bit checksums of records: XXH3, and SHA-256 cut to 128 bits, which earlier servers wrote where there was no XXH3.

Both find any flipped bit but for a chance of 2⁻¹²⁸ (a CRC of 32 bits misses one damage in four billion, which a server
that reads all day comes near). XXH3 runs at memory speed, SHA-256 at about that of a disk. They are asked to find
damage, not attackers: who may write the folder may do worse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import xxhash

DIGEST_BYTES = 16


def _sha256(*parts: Any) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()[:DIGEST_BYTES]


def _xxh3(*parts: Any) -> bytes:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return bytes(digest.digest())


ALGORITHMS: dict[int, Callable[..., bytes]] = {1: _sha256, 2: _xxh3}
"""By the number that files carry. Each takes buffers and returns the digest of them put together."""
FASTEST = 2
"""What is written with."""
