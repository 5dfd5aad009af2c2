"""What can be asked for of a session's KV by name: show, pin, unpin, save, restore, prefetch, erase.

``save`` copies it to the disk tier and returns when it is there, so that it outlives the server; ``restore`` brings it
into memory and returns when it is there; ``prefetch`` only begins that. ``pin`` keeps it, also what later requests of
the session leave, until ``unpin``: written to disk as it comes, and never dropped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from python_backends.errors import InvalidParameterError, SessionNotFoundError, TierIoError, UnsupportedFeatureError
from python_backends.kv import identity
from python_backends.kv.blocks import EntryKey, Move, Tier
from python_backends.kv.countdown import Countdown
from python_backends.kv.sessions import Sessions
from python_backends.kv.tiers.base import TierStore

if TYPE_CHECKING:
    from python_backends.kv.cache import KvCache

ACTIONS = ("show", "pin", "unpin", "save", "restore", "prefetch", "erase")
MOVES_AT_ONCE = 256
PATIENCE_S = 60.0
"""For ``save`` and ``restore``."""
STALLED_S = 1.0
"""Without anything that arrives they fail."""
POLL_S = 0.02


class SessionCommands:
    """See the module. Calls may block on disks; thread-safe.

    Args:
        cache: whose entries.
        sessions: their names.
        stores: by tier.
        clock: the cache's.
    """

    def __init__(
        self, cache: KvCache, sessions: Sessions, stores: Mapping[Tier, TierStore], clock: Callable[[], float]
    ) -> None:
        self._cache = cache
        self._sessions = sessions
        self._stores = stores
        self._clock = clock

    def carry_out(self, action: str, session: str, cache_salt: str = "") -> dict[str, object]:
        """Do it, and say what there is of the session then (``erase``: what there was); JSON-ready.

        Raises:
            InvalidParameterError: no such action.
            SessionNotFoundError: no such session, or nothing of it is left.
            UnsupportedFeatureError: nothing to save to.
            TierIoError: not all of it could be copied in time.
        """
        if action not in ACTIONS:
            raise InvalidParameterError(f"a session cannot {action!r}; it can {', '.join(ACTIONS)}")
        name = Sessions.name_of(session, identity.salt_hash(cache_salt))
        with self._cache.lock:
            keys = self._sessions.keys(name)
            if name not in self._sessions or not (keys or action == "erase"):
                raise SessionNotFoundError(f"nothing is kept of the session {session!r}")
            found = self._describe(name, keys)
            if action in ("pin", "unpin"):
                getattr(self._sessions, action)(name)
                found["pinned"] = action == "pin"
        if action == "erase":
            self._cache.carry_out_drops(lambda: self._sessions.erase(name, self._clock()))
        elif action == "prefetch":
            self._cache.prefetch([key for key in keys if not self._cache.in_memory(key)], lambda: None)
        elif action == "save":
            self._save(keys)
        elif action == "restore":
            self._restore(keys)
        self._cache.rebalance()
        if action in ("save", "restore"):
            with self._cache.lock:
                found = self._describe(name, keys)
        return found

    def _describe(self, name: str, keys: Sequence[EntryKey]) -> dict[str, object]:
        held = {tier: sum(key.num_bytes for key in keys if store.contains(key)) for tier, store in self._stores.items()}
        tokens = keys[-1].position if keys else 0
        return {"tokens": tokens, "bytes": held, "pinned": self._sessions.is_pinned(name)}

    def _save(self, keys: Sequence[EntryKey]) -> None:
        if "nvme" not in self._stores:
            raise UnsupportedFeatureError("a session is saved to the tier on disk; set nvme_path in wicore.json")
        saved = self._stores["nvme"].contains

        def plan() -> list[Move]:
            unsaved = [key for key in keys if not saved(key)]
            return self._cache.plan_save(unsaved[:MOVES_AT_ONCE])

        self._until(keys, saved, plan, "saved")

    def _restore(self, keys: Sequence[EntryKey]) -> None:
        def plan() -> list[Move]:
            cold = [key for key in keys if not self._cache.in_memory(key)]
            return self._cache.plan_prefetch(cold[:MOVES_AT_ONCE])

        self._until(keys, self._cache.in_memory, plan, "restored")

    def _until(
        self,
        keys: Sequence[EntryKey],
        arrived: Callable[[EntryKey], bool],
        plan: Callable[[], Sequence[Move]],
        what: str,
    ) -> None:
        """Carry out moves until all have arrived. They are held meanwhile, so none makes room for others."""
        with self._cache.hold(keys):
            deadline, stalled = time.monotonic() + PATIENCE_S, 0
            while missing := sum(not arrived(key) for key in keys):
                moves, over = plan(), threading.Event()
                pending = Countdown(len(moves), over.set)
                for move in moves:
                    self._cache.carry_out(move, pending.tick)
                over.wait(max(0.0, deadline - time.monotonic()))
                if sum(not arrived(key) for key in keys) < missing:
                    stalled = 0
                    continue
                # Nothing came: the disk fails or is full, or an entry is on its way elsewhere just now.
                stalled += 1
                if stalled * POLL_S > STALLED_S or time.monotonic() >= deadline:
                    text = f"{missing} of {len(keys)} entries could not be {what}; see `wicore stats`"
                    raise TierIoError(text, "stalled")
                time.sleep(POLL_S)
