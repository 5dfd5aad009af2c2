"""Carries out the moves that the book-keeper plans: payloads are copied between tiers, then the books are told."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from python_backends.errors import EntryLostError, TierError
from python_backends.kv.blocks import EntryId, EntryKey, Move, Tier
from python_backends.kv.tiers.base import MemoryStore, TierStore

if TYPE_CHECKING:
    from python_backends.kv.manager import KvManager
    from python_backends.kv.mover import Mover

log = logging.getLogger("wicore")


class Carrier:
    """Thread-safe. The arguments are those of `KvCache`.

    Args:
        manager: called under ``lock`` alone.
        stores: by tier.
        memory: those of them whose payloads lie in memory.
        mover: copies on threads of its own; None copies at once.
        lock: of the books; not held while bytes are copied.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        manager: KvManager,
        stores: Mapping[Tier, TierStore],
        memory: Mapping[Tier, MemoryStore],
        mover: Mover | None,
        lock: threading.RLock,
        clock: Callable[[], float],
    ) -> None:
        self._manager, self._stores, self._memory, self._mover = manager, stores, memory, mover
        self._lock, self._clock = lock, clock
        self.filling: set[EntryId] = set()
        """Entries that are in the books and not in their tier yet; to be changed under the lock."""

    def begin(self, moves: Sequence[Move]) -> list[Move]:
        """Those of ``moves`` that may begin, begun in the books; call it under the lock and give each to `run`."""
        return [move for move in moves if move.key.id not in self.filling and self._manager.begin(move, self._clock())]

    def run(
        self,
        move: Move,
        priority: int,
        deadline_s: float,
        done: Callable[[], None] = lambda: None,
        *,
        inline: bool = False,
    ) -> None:
        """Carry out a move that has begun, and end it in the books."""
        if move.target is None:
            self.finish(move, None)
            done()
        elif self._mover is None or inline:
            self.finish(move, self._copy(move, move.target))
            done()
        else:
            future = self._mover.submit(move, priority=priority, deadline_s=deadline_s)
            future.add_done_callback(functools.partial(self._copied, move, done))

    def _copy(self, move: Move, target: Tier) -> TierError | None:
        try:
            if move.source in self._memory:
                with self._memory[move.source].view(move.key) as payload:
                    self._stores[target].write(move.key, payload)
            else:
                with self._memory[target].fill(move.key) as room:
                    self._stores[move.source].read(move.key, room)
        except TierError as error:
            return error
        return None

    def _copied(self, move: Move, done: Callable[[], None], future: Future[None]) -> None:
        error = None if future.cancelled() else future.exception()
        if future.cancelled():
            error = TierError("cancelled", "cancelled")
        elif error is not None and not isinstance(error, TierError):
            log.error("moving a KV entry failed", exc_info=error)
            error = TierError(str(error), "unexpected")
        self.finish(move, error)
        done()

    def finish(self, move: Move, error: TierError | None) -> None:
        """End a move in the books, and drop what they then no longer hold."""
        with self._lock:
            now = self._clock()
            reason = "" if error is None else error.reason
            drops = self._manager.finish(move, now, ok=error is None, reason=reason)
            if isinstance(error, EntryLostError):
                self._manager.lost(move.key, move.source, reason, now)
            for store in self._stores.values():
                for key in store.take_lost():
                    self._manager.lost(key, store.name, "damaged", now)
        for key, tier in drops:
            if move.reason == "erase":
                self._erase(key, tier)
            else:
                self._stores[tier].drop(key)

    def _erase(self, key: EntryKey, tier: Tier) -> None:
        try:
            self._stores[tier].erase([key])
        except TierError as error:  # the tier tries again, and serves it to nobody
            log.warning("%s", error.message)
