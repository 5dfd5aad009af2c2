"""What a tier offers: bytes by key, verified, within a limit, and never another exception than the two named here.

A store holds payloads and knows nothing of their worth: which entries to keep is `KvManager`'s business. All calls
block, may come from any thread, and raise only `TierFullError`, `TierIoError` (writing) and `EntryLostError` (reading).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from python_backends.errors import EntryLostError, TierFullError, TierIoError
from python_backends.kv.blocks import EntryKey, Tier

WriteFailure = TierFullError | TierIoError


@dataclass
class TierStats:
    """One tier's state and counters since start; `as_dict` for the metrics."""

    limit_bytes: int
    usable_bytes: int
    """Payload bytes that are guaranteed to fit: what `KvManager`'s capacity may be at most."""
    used_bytes: int
    """Memory or disk that is taken: payloads, padding, headers, and what waits for collection."""
    live_bytes: int
    """Payloads of the entries that are held."""
    entries: int
    largest_free_bytes: int
    """Longest run that one payload could take without any other being moved first."""
    pressure: float
    """Live bytes ÷ usable bytes; 1 is full."""
    writes: int = 0
    written_bytes: int = 0
    """Payload bytes accepted."""
    reads: int = 0
    read_bytes: int = 0
    """Payload bytes given back."""
    failures: dict[str, int] = field(default_factory=dict)
    """What went wrong, by reason: those of the three errors, and the damage found at start."""
    details: dict[str, int | float | str] = field(default_factory=dict)
    """Counters that only this kind of tier has."""

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return dataclasses.asdict(self)


class TierStore(Protocol):
    """One tier's payloads."""

    @property
    def name(self) -> Tier:
        """Which tier."""
        ...

    @property
    def limit_bytes(self) -> int:
        """Memory or disk it may take."""
        ...

    @property
    def usable_bytes(self) -> int:
        """Payload bytes that are guaranteed to fit, whatever came and went before."""
        ...

    def write(self, key: EntryKey, payload: memoryview) -> None:
        """Store a payload of ``key.num_bytes`` contiguous bytes; nothing happens where the key is held already.

        When it returns, the payload can be read back; on NVMe it is in the file (`erase` alone waits for the medium).

        Raises:
            TierFullError: no room: something must be dropped, or a budget is spent (``reason``).
            TierIoError: the medium failed, or it failed before and is left alone for a while (``reason``).
        """
        ...

    def write_many(self, items: Sequence[tuple[EntryKey, memoryview]]) -> list[WriteFailure | None]:
        """As `write`, in as few large transfers as possible; one result per item, None where it succeeded."""
        ...

    def read(self, key: EntryKey, into: memoryview) -> None:
        """Fill ``into`` (``key.num_bytes`` writable bytes). What a failed read leaves in it is undefined.

        Raises:
            EntryLostError: it cannot be given back, and (unless ``reason`` is "paused") is not held any more.
        """
        ...

    def read_many(self, items: Sequence[tuple[EntryKey, memoryview]]) -> list[EntryLostError | None]:
        """As `read`, in as few large transfers as possible; one result per item."""
        ...

    def drop(self, key: EntryKey) -> None:
        """Free it. One that is being read goes as soon as that ends. Nothing happens where it is not held."""
        ...

    def erase(self, keys: Iterable[EntryKey]) -> None:
        """Drop entries so that nothing of them can be read back, after a crash or a restart either.

        Raises TierIoError where the medium refuses; it is tried again on later calls, and they are never served.
        """
        ...

    def contains(self, key: EntryKey) -> bool:
        """Whether `read` would look for it."""
        ...

    def entries(self) -> Iterator[EntryKey]:
        """Everything held; on NVMe that is what earlier servers left, too."""
        ...

    def take_lost(self) -> list[EntryKey]:
        """Entries the store itself gave up since the last call (damage it came across, room it had to make)."""
        ...

    def stats(self) -> TierStats:
        """State and counters."""
        ...

    def check_integrity(self) -> None:
        """Raises InternalError where the store's own books disagree."""
        ...

    def close(self) -> None:
        """Give memory or files back. Later writes raise TierIoError and later reads EntryLostError ("closed")."""
        ...


class MemoryStore(TierStore, Protocol):
    """A tier in memory (`arena.Arena`): entries can be read and made in place."""

    def view(self, key: EntryKey) -> AbstractContextManager[memoryview]:
        """The payload itself, read-only; it is neither moved nor reused while the context is open.

        Raises EntryLostError ("missing") on entry.
        """
        ...

    def fill(self, key: EntryKey) -> AbstractContextManager[memoryview]:
        """Room for a payload to be made in place; held from the clean end of the context on, freed by an exception.

        Raises TierFullError on entry, and InternalError where the entry is held or being filled.
        """
        ...

    def disown(self, key: EntryKey) -> None:
        """Give up a `fill` that somebody else is stuck in: its room stays taken until they leave, the key is free."""
        ...

    def defragment(self, run_bytes: int, most_bytes: int) -> int:
        """Make sure that ``run_bytes`` are free in one piece by moving at most ``most_bytes``; returns bytes moved."""
        ...


Items = Sequence[tuple[EntryKey, memoryview]]


def write_each(write: Callable[[EntryKey, memoryview], None], items: Items) -> list[WriteFailure | None]:
    """`TierStore.write_many` where many are no faster than one after the other."""
    results: list[WriteFailure | None] = []
    for key, payload in items:
        try:
            write(key, payload)
            results.append(None)
        except (TierFullError, TierIoError) as error:
            results.append(error)
    return results


def read_each(read: Callable[[EntryKey, memoryview], None], items: Items) -> list[EntryLostError | None]:
    """`TierStore.read_many` where many are no faster than one after the other."""
    results: list[EntryLostError | None] = []
    for key, into in items:
        try:
            read(key, into)
            results.append(None)
        except EntryLostError as error:
            results.append(error)
    return results
