"""A tier in memory that keeps payloads in fewer bits: `MemoryStore` around an arena, with a copy each way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from python_backends.errors import EntryLostError
from python_backends.kv.blocks import EntryId, EntryKey, Tier
from python_backends.kv.tiers.arena import Arena
from python_backends.kv.tiers.base import TierStats, WriteFailure, read_each, write_each
from python_backends.kv.tiers.codec import Codec


class CodedArena:
    """See the module. ``usable_bytes`` and sizes of keys are those of payloads, as everywhere above the tiers.

    Args:
        arena: holds what the codec makes of payloads.
        codec: what is done to them.
        block_bytes: payload of a block.
    """

    def __init__(self, arena: Arena, codec: Codec, block_bytes: int) -> None:
        self.name: Tier = arena.name
        self.limit_bytes = arena.limit_bytes
        self._arena, self._codec = arena, codec
        self._growth = block_bytes / codec.stored_bytes(block_bytes)
        self.usable_bytes = int(arena.usable_bytes * self._growth)
        self._keys: dict[EntryId, EntryKey] = {}

    def _stored(self, key: EntryKey) -> EntryKey:
        return dataclasses.replace(key, num_bytes=self._codec.stored_bytes(key.num_bytes))

    # -- writing -----------------------------------------------------------------------------------------------------
    def write(self, key: EntryKey, payload: memoryview) -> None:
        """See `TierStore.write`."""
        if not self.contains(key):
            with self._arena.fill(self._stored(key)) as room:
                self._codec.encode(payload, room)
            self._keys[key.id] = key

    def write_many(self, items: Sequence[tuple[EntryKey, memoryview]]) -> list[WriteFailure | None]:
        """See `TierStore.write_many`."""
        return write_each(self.write, items)

    @contextmanager
    def fill(self, key: EntryKey) -> Iterator[memoryview]:
        """See `MemoryStore.fill`: room beside the arena, coded into it at the end."""
        with self._arena.fill(self._stored(key)) as room:
            payload = memoryview(bytearray(key.num_bytes))
            yield payload
            self._codec.encode(payload, room)
        self._keys[key.id] = key

    def disown(self, key: EntryKey) -> None:
        """See `MemoryStore.disown`."""
        self._arena.disown(self._stored(key))

    # -- reading -----------------------------------------------------------------------------------------------------
    def read(self, key: EntryKey, into: memoryview) -> None:
        """See `TierStore.read`."""
        with self._arena.view(self._stored(key)) as stored:
            self._codec.decode(stored, into)

    def read_many(self, items: Sequence[tuple[EntryKey, memoryview]]) -> list[EntryLostError | None]:
        """See `TierStore.read_many`."""
        return read_each(self.read, items)

    @contextmanager
    def view(self, key: EntryKey) -> Iterator[memoryview]:
        """See `MemoryStore.view`: a decoded copy."""
        payload = memoryview(bytearray(key.num_bytes))
        self.read(key, payload)
        yield payload.toreadonly()

    # -- freeing -----------------------------------------------------------------------------------------------------
    def drop(self, key: EntryKey) -> None:
        """See `TierStore.drop`."""
        self._arena.drop(self._stored(key))
        self._keys.pop(key.id, None)

    def erase(self, keys: Iterable[EntryKey]) -> None:
        """See `TierStore.erase`."""
        gone = list(keys)
        self._arena.erase([self._stored(key) for key in gone])
        for key in gone:
            self._keys.pop(key.id, None)

    def defragment(self, run_bytes: int, most_bytes: int) -> int:
        """See `MemoryStore.defragment`."""
        return self._arena.defragment(self._codec.stored_bytes(run_bytes), most_bytes)

    # -- state -------------------------------------------------------------------------------------------------------
    def contains(self, key: EntryKey) -> bool:
        """See `TierStore.contains`."""
        return self._arena.contains(key)

    def entries(self) -> Iterator[EntryKey]:
        """See `TierStore.entries`."""
        return iter([self._keys[stored.id] for stored in self._arena.entries() if stored.id in self._keys])

    def take_lost(self) -> list[EntryKey]:
        """See `TierStore.take_lost`: memory loses nothing."""
        return []

    def stats(self) -> TierStats:
        """See `TierStore.stats`; live and usable bytes are payloads."""
        found = self._arena.stats()
        live = int(found.live_bytes * self._growth)
        return dataclasses.replace(found, usable_bytes=self.usable_bytes, live_bytes=live)

    def check_integrity(self) -> None:
        """See `TierStore.check_integrity`."""
        self._arena.check_integrity()

    def close(self) -> None:
        """See `TierStore.close`."""
        self._arena.close()
