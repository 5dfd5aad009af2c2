"""Entries whose payload follows from their id, so that any wrong byte shows."""

from hashlib import blake2b

import numpy as np

from python_backends.kv.blocks import EntryKey, EntryKind


def entry(
    number: int, num_bytes: int, kind: EntryKind = "block", parent: int = -1, salt: bytes = bytes(32)
) -> EntryKey:
    return EntryKey(_id(number), kind, _id(parent), 64 * (number % 1000 + 1), num_bytes, salt)


def _id(number: int) -> bytes:
    return blake2b(str(number).encode(), digest_size=32).digest()


def payload(key: EntryKey) -> bytes:
    seed = int.from_bytes(key.id[:8], "little")
    return np.random.Generator(np.random.PCG64(seed)).bytes(key.num_bytes)


def room(key: EntryKey) -> memoryview:
    return memoryview(bytearray(key.num_bytes))
