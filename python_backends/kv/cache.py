"""The KV cache as the engine sees it: look a prompt up, load what is held, keep what was computed.

Binds the book-keeper (`KvManager`), the tiers' payloads (`TierStore`) and the threads that move them (`Mover`). The
book-keeper is called under one lock, which is never held while bytes are read or written. Payloads come and go through
the runtime (`DecoderRuntime.export_block` …), on the engine's thread alone.

An entry that is being filled is announced to the book-keeper first, so that its room is counted; until it is there no
move of it is begun (`Carrier`), and only the engine's thread, which fills it, could load it.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from python_backends.errors import EntryLostError, TierError
from python_backends.kv import identity
from python_backends.kv.blocks import TIERS, EntryKey, Match, Move, Tier
from python_backends.kv.carrier import Carrier
from python_backends.kv.costs import DISK_BYTES_PER_S
from python_backends.kv.countdown import Countdown
from python_backends.kv.hit import Hit
from python_backends.kv.identity import ImageSpan, PromptIds
from python_backends.kv.session_commands import SessionCommands
from python_backends.kv.sessions import Sessions
from python_backends.kv.tiers.base import MemoryStore, TierStore
from python_backends.runtime.base import KvLayout

if TYPE_CHECKING:
    from python_backends.kv.costs import LinkSpeeds
    from python_backends.kv.defragmenter import Defragmenter
    from python_backends.kv.manager import KvManager
    from python_backends.kv.mover import Mover
    from python_backends.kv.policies.base import Visit

PAYLOAD_VERSION = 1
MOVES_AT_ONCE = 16
"""Moves begun in one go; each that ends makes room for another."""
LOAD_DEADLINE_S, LOAD_PATIENCE = 2.0, 4.0
"""A load from NVMe is a miss after so many seconds and so many times what it should take."""
WRITE_DEADLINE_S = 30.0
URGENT, IDLE = 0, 1
"""Priorities of moves: a request waits; nobody does."""


class KvCache:
    """See the module. Thread-safe; `keep` and `Hit.load` belong to the engine's thread.

    Args:
        layout: of the runtime whose KV it holds.
        fingerprint: what else the KV depends on: weights, precision, kernels.
        manager: with the limits of ``stores``.
        stores: by tier.
        memory: those of them that are in memory, "device" or "host" or both; entries are made in the first.
        mover: copies between tiers; None copies at once on the thread that asks (no waiting on disks then).
        clock: seconds, monotonic.
        session_file: where names of sessions outlive the server; None: nowhere.
        defragmenter: of ``memory``; closed with the cache.
        prefetch_tokens: most tokens of a prompt that are brought up from a disk; None: any number.
    """

    def __init__(
        self,
        layout: KvLayout,
        fingerprint: str,
        manager: KvManager,
        stores: Mapping[Tier, TierStore],
        memory: Mapping[Tier, MemoryStore],
        mover: Mover | None = None,
        clock: Callable[[], float] = time.monotonic,
        session_file: Path | None = None,
        defragmenter: Defragmenter | None = None,
        prefetch_tokens: int | None = None,
    ) -> None:
        self.layout = layout
        self.prefetch_tokens = prefetch_tokens
        self._fingerprint = hashlib.sha256(f"{fingerprint}/{layout.identity}".encode()).digest()
        self._manager = manager
        self._stores = dict(stores)
        self._memory = dict(memory)
        self._first: Tier = next(tier for tier in TIERS if tier in memory)
        self._mover = mover
        self._defragmenter = defragmenter
        self._clock = clock
        self.lock = threading.RLock()
        """Of the books; held by nobody who reads or writes payloads."""
        self._carrier = Carrier(manager, self._stores, self._memory, mover, self.lock, clock)
        self._tokens: Counter[str] = Counter()
        self._lookups: Counter[str] = Counter()
        self._closed = False
        self._recover()
        self._sessions = Sessions(manager, session_file)
        self._commands = SessionCommands(self, self._sessions, self._stores, clock)

    def _recover(self) -> None:
        """Take over what an earlier server left on disk."""
        for tier, store in self._stores.items():
            if tier not in self._memory:
                for key in self._manager.recover(list(store.entries()), tier, self._clock()):
                    store.drop(key)

    # --- looking up -----------------------------------------------------------------------------------------------

    def prompt_ids(self, tokens: Sequence[int], images: Sequence[ImageSpan] = (), cache_salt: str = "") -> PromptIds:
        """The ids of a prompt's entries."""
        root = identity.root_id(
            fingerprint=self._fingerprint,
            dtype=self.layout.dtype,
            layout_version=PAYLOAD_VERSION,
            block_tokens=self.layout.block_tokens,
            cache_salt=cache_salt,
        )
        return PromptIds(
            tokens,
            images=images,
            root=root,
            block_tokens=self.layout.block_tokens,
            salt=identity.salt_hash(cache_salt),
        )

    def look_up(self, ids: PromptIds, limit: int, token_s: float = 0.0) -> Hit:
        """The longest beginning of at most ``limit`` tokens that is held; what of it lies on NVMe is being loaded.

        Where computing takes ``token_s`` a token (0: unknown), what would be computed sooner is not loaded.
        """
        hit = Hit(self, ids, limit, token_s)
        hit.find()
        return hit

    def held_blocks(self, ids: PromptIds) -> int:
        """Blocks from the first on that are held without a gap."""
        with self.lock:
            return self._manager.match(ids, len(ids), self._clock()).deepest_block_match // self.layout.block_tokens

    def match(self, ids: PromptIds, limit: int) -> Match:
        """The longest beginning of at most ``limit`` tokens, acquired."""
        with self.lock:
            match = self._manager.match(ids, limit, self._clock())
            self._manager.acquire(match.keys)
            return match

    def release(self, keys: Sequence[EntryKey]) -> None:
        """Let go of what `match` acquired."""
        with self.lock:
            self._manager.release(keys)

    @property
    def speeds(self) -> LinkSpeeds | None:
        """Measured bandwidths; None where nothing moves on threads of its own."""
        return None if self._mover is None else self._mover.speeds

    def prefetch(self, keys: Sequence[EntryKey], done: Callable[[], None]) -> None:
        """Bring entries into host memory; ``done`` is called once, maybe at once, maybe from another thread."""
        moves = self.plan_prefetch(keys)
        pending, deadline_s = Countdown(len(moves), done), self.load_deadline_s(moves)
        for move in moves:
            self._carrier.run(move, URGENT, deadline_s, pending.tick)

    def load_deadline_s(self, moves: Sequence[Move]) -> float:
        """When loading is late: more is given where much is loaded."""
        speed = DISK_BYTES_PER_S if self.speeds is None else self.speeds.bytes_per_s(("nvme", self.load_target))
        return LOAD_DEADLINE_S + LOAD_PATIENCE * sum(move.key.num_bytes for move in moves) / speed

    @property
    def load_target(self) -> Tier:
        """Where what lies on NVMe is brought."""
        return "host" if "host" in self._memory else "device"

    # --- keeping --------------------------------------------------------------------------------------------------

    def keep(
        self,
        key: EntryKey,
        export: Callable[[memoryview], None],
        *,
        recompute_s: float = 0.0,
        visit: Visit | None = None,
    ) -> bool:
        """Take an entry up; ``export`` fills its payload. Whether it is held now.

        ``recompute_s`` is what computing it again would take, the entries before it given; ``visit`` is the request's.
        """
        with self.lock:
            if self._closed:
                return False
            insert = self._manager.insert(key, self._first, self._clock(), recompute_s=recompute_s, visit=visit)
            self._carrier.filling |= {key.id} if insert.accepted and not insert.known else set()
        for move in insert.evict:
            self._carrier.run(move, URGENT, WRITE_DEADLINE_S, inline=True)
        if not insert.accepted or insert.known:
            return insert.known
        held = self._fill(key, export)
        self.rebalance()
        return held

    def _fill(self, key: EntryKey, export: Callable[[memoryview], None]) -> bool:
        try:
            with self._memory[self._first].fill(key) as room:
                export(room)
        except TierError as error:
            with self.lock:
                self._manager.lost(key, self._first, error.reason, self._clock())
            return False
        finally:
            with self.lock:
                self._carrier.filling.discard(key.id)
        return True

    def touch(self, keys: Sequence[EntryKey]) -> Visit:
        """A request uses these entries, maybe none; give the visit to `keep` with what it adds."""
        with self.lock:
            return self._manager.touch(keys, self._clock())

    def count(self, by_tier: Mapping[str, int], num_tokens: int, missed: str) -> None:
        """A prompt of ``num_tokens`` had so many from each tier, and no more because of ``missed``."""
        with self.lock:
            self._tokens.update(by_tier)
            self._tokens["computed"] += num_tokens - sum(by_tier.values())
            self._lookups[missed] += 1

    # --- sessions -------------------------------------------------------------------------------------------------

    def keep_session(self, session: str, tip: EntryKey, prompt: EntryKey | None) -> None:
        """The newest request of a session ended with this tail, its prompt with the other; its salt is the tail's."""
        with self.lock:
            self._sessions.keep(Sessions.name_of(session, tip.salt), tip, prompt)
        self.rebalance()

    def session(self, action: str, session: str, cache_salt: str = "") -> dict[str, object]:
        """See `SessionCommands.carry_out`."""
        return self._commands.carry_out(action, session, cache_salt)

    @contextlib.contextmanager
    def hold(self, keys: Sequence[EntryKey]) -> Iterator[None]:
        """Entries stay where they are meanwhile; copies may be made."""
        with self.lock:
            self._manager.acquire(keys)
        try:
            yield
        finally:
            self.release(keys)

    def plan_save(self, keys: Sequence[EntryKey]) -> list[Move]:
        """Copies to the slowest tier, begun; give each to `carry_out`."""
        with self.lock:
            return self._carrier.begin(self._manager.plan_save(keys, self._clock()))

    def plan_prefetch(self, keys: Sequence[EntryKey]) -> list[Move]:
        """Copies into memory, begun; give each to `carry_out`."""
        with self.lock:
            return self._carrier.begin(self._manager.plan_prefetch(keys, self.load_target, self._clock()))

    def carry_out(self, move: Move, done: Callable[[], None]) -> None:
        """A move that has begun and that somebody waits for; ``done`` as `prefetch`."""
        deadline_s = WRITE_DEADLINE_S if move.target == "nvme" else self.load_deadline_s([move])
        self._carrier.run(move, URGENT, deadline_s, done)

    def carry_out_drops(self, begin: Callable[[], Sequence[Move]]) -> None:
        """Drops that ``begin``, called under the lock, has begun."""
        with self.lock:
            moves = begin()
        for move in moves:
            self._carrier.finish(move, None)

    # --- what was used --------------------------------------------------------------------------------------------

    def observe(self, keys: Sequence[EntryKey], masses: Sequence[float]) -> None:
        """Attention that entries in use received, relative to the mean of their prompt's blocks."""
        with self.lock:
            self._manager.observe(keys, masses)

    # --- moving ---------------------------------------------------------------------------------------------------

    def rebalance(self) -> None:
        """Begin the moves that tiers above their watermark and pinned entries ask for."""
        with self.lock:
            if self._closed:
                return
            moves = self._carrier.begin(self._manager.plan_moves(self._clock(), MOVES_AT_ONCE))
        for move in moves:
            self._carrier.run(move, IDLE, WRITE_DEADLINE_S, self._go_on)

    def _go_on(self) -> None:
        # Without threads of its own a move ends before `rebalance` returns; it would call itself for ever deeper.
        if self._mover is not None:
            self.rebalance()

    # --- state ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def view(self, key: EntryKey) -> Iterator[memoryview]:
        """A payload in memory. Raises EntryLostError where no tier in memory has it."""
        for tier in TIERS:
            if tier in self._memory and self._memory[tier].contains(key):
                with self._memory[tier].view(key) as payload:
                    yield payload
                return
        raise EntryLostError(f"a {key.kind} of {key.position} tokens is not in memory", "missing")

    def in_memory(self, key: EntryKey) -> bool:
        """Whether `view` would find it."""
        return any(store.contains(key) for store in self._memory.values())

    def stats(self) -> dict[str, object]:
        """Of the book-keeper and of every tier; JSON-ready."""
        with self.lock:
            found = dict(self._manager.stats())
        tiers = {tier: store.stats().as_dict() for tier, store in self._stores.items()}
        moves = {} if self._mover is None else self._mover.stats()
        with self.lock:
            counted = {"prompt_tokens": dict(self._tokens), "lookups": dict(self._lookups)}
        return {"manager": found, "tiers": tiers, "mover": moves, **counted}

    def check_integrity(self) -> None:
        """Raise InternalError where the books disagree with themselves or with what the tiers hold."""
        with self.lock:
            self._manager.check_integrity()
        for store in self._stores.values():
            store.check_integrity()

    def close(self) -> None:
        """End the moves and close the tiers; what is on NVMe stays for the next server."""
        with self.lock:
            self._closed = True
        if self._mover is not None:
            self._mover.close()
        if self._defragmenter is not None:
            self._defragmenter.close()
        for store in self._stores.values():
            store.close()
