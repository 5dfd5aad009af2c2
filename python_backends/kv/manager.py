"""The book-keeper of the KV cache: what is held where, who uses it, what goes next. No tensors, no clock, no I/O.

One object under the cache's lock. Entries form a forest: a block's parent is the block before it, a tail's parent the
last full block before it, and an entry is of use only while all its ancestors are held somewhere. Demotions, drops and
copies are proposed as `Move`s; the caller carries them out and reports back. Between `begin` and `finish` a move's
entry takes bytes on both tiers and cannot be chosen for another move.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from python_backends.errors import InternalError
from python_backends.kv.admission import Admission
from python_backends.kv.blocks import EntryId, EntryKey, Insert, Match, MissReason, Move, Tier, TierLimits
from python_backends.kv.counters import Counters
from python_backends.kv.entries import BIT, Entry, EntryTable
from python_backends.kv.identity import EntryIds
from python_backends.kv.moves import Moves
from python_backends.kv.policies import PolicySet
from python_backends.kv.policies.base import Visit

MASS_MEMORY = 0.7
"""Weight of what was known when a new attention mass is averaged in."""


class KvManager:
    """See the module.

    Args:
        limits: the tiers there are, any of `TIERS`.
        policies: `policies.make_policies`.
        admission: what may be written to NVMe; None: everything.
        block_tokens: tokens of a block.
        quota_bytes: what one salt's entries may take on each tier, where `set_quota` says nothing else; None: no limit.
        needs_tails: False for a model without sliding-window layers: every block boundary can be resumed at.

    Every ``now`` is in seconds; one that is before an earlier one counts as that one.
    """

    def __init__(
        self,
        limits: Mapping[Tier, TierLimits],
        policies: PolicySet,
        admission: Admission | None = None,
        *,
        block_tokens: int = 64,
        needs_tails: bool = True,
        quota_bytes: int | None = None,
    ) -> None:
        self._table = EntryTable(limits, policies.by_tier, block_tokens)
        self._reuse = policies.reuse
        self._block_tokens = block_tokens
        self._needs_tails = needs_tails
        self._counters = Counters()
        self._quotas: dict[bytes, int] = {}
        self._quota = quota_bytes
        self._moves = Moves(self._table, admission, self._counters, self._quota_of)
        self._now = 0.0

    def _advance(self, now: float) -> float:
        self._now = max(self._now, now)
        return self._now

    # -- lookup ------------------------------------------------------------------------------------------------------
    def match(self, ids: EntryIds, limit: int, now: float) -> Match:
        """The longest beginning of at most ``limit`` tokens that can be resumed exactly. Changes nothing."""
        limit = min(limit, len(ids))
        blocks: list[Entry] = []
        for index in range(limit // self._block_tokens):
            entry = self._table.get(ids.block_id(index))
            if entry is None or not entry.held or entry.doomed:
                break
            blocks.append(entry)
        deepest = len(blocks) * self._block_tokens
        tail = self._longest_tail(ids, len(blocks), limit) if self._needs_tails else None
        length = (tail.key.position if tail else 0) if self._needs_tails else deepest
        del blocks[length // self._block_tokens :]
        return Match(
            length=length,
            blocks=tuple([entry.key for entry in blocks]),
            tail=tail.key if tail else None,
            block_tiers=tuple([entry.fastest() for entry in blocks]),
            tail_tier=tail.fastest() if tail else None,
            missed=self._reason(ids, length, deepest, limit),
            deepest_block_match=deepest,
        )

    def _longest_tail(self, ids: EntryIds, blocks: int, limit: int) -> Entry | None:
        """The deepest readable tail that belongs to this prompt, behind its first ``blocks`` blocks."""
        for depth in range(blocks, -1, -1):
            candidates = self._table.children(ids.block_id(depth - 1))
            positions = {entry.key.position for entry in candidates.values() if entry.key.kind == "tail"}
            for position in sorted(positions, reverse=True):
                if position <= limit and ids.can_resume_at(position):
                    found = candidates.get(ids.tail_id(position))
                    if found is not None and found.held and not found.doomed:
                        return found
        return None

    def _reason(self, ids: EntryIds, length: int, deepest: int, limit: int) -> MissReason:
        if length == limit:
            return ""
        if deepest > length:
            return "no_tail"
        index = deepest // self._block_tokens
        if index >= limit // self._block_tokens:  # what is left is less than a block
            return "no_tail" if self._needs_tails else ""
        entry = self._table.get(ids.block_id(index))
        if entry is not None:
            return "erased" if entry.doomed else "in_flight"
        ghost = self._table.ghost(ids.block_id(index))
        return ghost[1] if ghost else "new"

    def acquire(self, keys: Iterable[EntryKey]) -> None:
        """Hold entries: while held they are neither evicted nor moved away. Counted; shared between requests.

        Raises InternalError where one is not held on any tier (all or none are acquired).
        """
        found = [self._table.get(key.id) for key in keys]
        entries = [entry for entry in found if entry is not None and entry.held]
        if len(entries) != len(found):
            raise InternalError("an entry to acquire is not held; match and acquire under one lock")
        for entry in entries:
            entry.refs += 1

    def release(self, keys: Iterable[EntryKey]) -> None:
        """Undo one `acquire`. Raises InternalError where there was none."""
        for key in keys:
            if not self._table.hold(key.id, -1, 0):
                raise InternalError(f"a {key.kind} of {key.position} tokens is released more often than acquired")

    def touch(self, keys: Sequence[EntryKey], now: float, masses: Sequence[float] | None = None) -> Visit:
        """A request uses these entries (those that `match` gave, maybe none): counts as one reuse of each.

        Give the returned visit to `insert` with what the request adds, so that one request counts as one.
        ``masses``: see `observe`.
        """
        now = self._advance(now)
        entries = [entry for key in keys if (entry := self._table.get(key.id)) is not None]
        visit = self._reuse.open_visit(now)
        for entry in entries:
            self._use(entry, visit, now)
        if masses is not None:
            self.observe(keys, masses)
        return visit

    def _use(self, entry: Entry, visit: Visit, now: float) -> None:
        if entry.visit is visit:
            return
        self._reuse.move(entry, visit, now)
        for book in self._table.books:
            if entry.held & book.bit:
                book.policy.on_access(entry, now)

    def observe(self, keys: Sequence[EntryKey], masses: Sequence[float]) -> None:
        """Attention that each entry received, relative to the mean of the prompt's blocks (1.0 is the mean)."""
        for key, mass in zip(keys, masses, strict=True):
            entry = self._table.get(key.id)
            if entry is not None:
                known = mass if entry.mass is None else entry.mass
                entry.mass = MASS_MEMORY * known + (1 - MASS_MEMORY) * mass

    # -- what comes and goes -----------------------------------------------------------------------------------------
    def insert(
        self,
        key: EntryKey,
        tier: Tier,
        now: float,
        *,
        mass: float | None = None,
        recompute_s: float = 0.0,
        visit: Visit | None = None,
    ) -> Insert:
        """Make room on ``tier`` and count the entry there; the caller has or will put the payload. Parents first.

        ``visit``: what `touch` gave the request; None takes the parent's newest.
        Not accepted where room cannot be made (everything is in use), its parent is not held, its salt's quota is
        spent, or it is on its way in or out of that tier.
        """
        now = self._advance(now)
        book = self._table.book(tier)
        entry = self._table.get(key.id)
        parent = self._table.get(key.parent)
        if visit is None:
            visit = parent.visit if parent else self._reuse.open_visit(now)
        if entry is not None and entry.held & book.bit and not entry.doomed:
            self._use(entry, visit, now)
            return Insert(accepted=True, known=True)
        blocked = (parent is None and not self._table.is_first(key)) or self._moves.is_dropping(key.id, tier)
        if blocked or (entry is not None and (entry.doomed or entry.moving is not None)):
            return Insert(accepted=False)
        protected = [one for one in (entry, parent) if one is not None]
        for one in protected:
            one.refs += 1
        fits, evict = self._moves.make_room(book, key, self._quota_of(key.salt), now)
        for one in protected:
            one.refs -= 1
        if not fits:
            self._counters.refused += 1
            return Insert(accepted=False, evict=evict)
        if entry is None:
            entry = self._admit(key, visit, now)
        else:
            self._use(entry, visit, now)
        if mass is not None:
            entry.mass = mass
        entry.recompute_s = recompute_s or entry.recompute_s
        self._table.place(entry, entry.held | book.bit, 0, now)
        self._counters.inserted += 1
        return Insert(accepted=True, evict=evict)

    def _admit(self, key: EntryKey, visit: Visit, now: float) -> Entry:
        """An entry that is held nowhere yet, with the statistics of its earlier life where that is remembered."""
        self._forget()
        entry = self._table.revive(key)
        if entry is None:
            entry = Entry(key, visit)
            self._reuse.add(entry)
        else:
            self._reuse.move(entry, visit, now, held=False)
        return entry

    def _forget(self) -> None:
        for entry in self._table.forgotten:
            self._reuse.forget(entry)
        self._table.forgotten.clear()

    def recover(self, keys: Iterable[EntryKey], tier: Tier, now: float) -> list[EntryKey]:
        """Take over what a tier found in its files at start, in any order; returns what does not fit and must go."""
        now = self._advance(now)
        book = self._table.book(tier)
        refused: list[EntryKey] = []
        visit = self._reuse.open_visit(now)
        for key in sorted(keys, key=lambda key: key.position):  # a beginning is worth more than an end
            entry = self._table.get(key.id)
            if key.num_bytes > book.free or (entry is not None and (entry.present & book.bit or entry.moving)):
                refused.append(key)
                continue
            entry = entry or self._admit(key, visit, now)
            self._table.place(entry, entry.held | book.bit, entry.arriving, now)
        return refused

    def lost(self, key: EntryKey, tier: Tier, reason: str, now: float) -> None:
        """A tier failed to give the payload back (missing, short, checksum, …): not held there any more; counted."""
        now = self._advance(now)
        self._counters.count_lost(tier, reason)
        entry = self._table.get(key.id)
        if entry is not None and entry.held & BIT[tier]:
            self._table.place(entry, entry.held & ~BIT[tier], entry.arriving, now, reason="lost")

    def erase(self, keys: Iterable[EntryKey], now: float) -> list[Move]:
        """Forget entries and all that depends on them; what is in use cannot be matched any more and goes with a later
        `plan_moves`. The moves (drops) have begun; `finish` each."""
        now = self._advance(now)
        wanted = [entry for key in keys if (entry := self._table.get(key.id)) is not None]
        while wanted:
            entry = wanted.pop()
            wanted.extend(self._table.children(entry.key.id).values())
            self._moves.doom(entry)
        return self._moves.reap(now)

    # -- moves -------------------------------------------------------------------------------------------------------
    def plan_moves(self, now: float, limit: int) -> list[Move]:
        """Up to ``limit`` moves worth making now: down by watermark, write-through of pinned entries, drops."""
        return self._moves.plan(self._advance(now), limit)

    def plan_prefetch(self, keys: Sequence[EntryKey], target: Tier, now: float) -> list[Move]:
        """Copies that bring entries up to ``target``, in prompt order; drops of spare copies in front where room must
        be made. What finds no room stays where it is."""
        return self._moves.plan_prefetch(keys, self._table.book(target), self._advance(now))

    def plan_save(self, keys: Sequence[EntryKey], now: float) -> list[Move]:
        """Copies of entries on the slowest tier, and drops of others that make room for them there."""
        return self._moves.plan_save(keys, self._advance(now))

    def begin(self, move: Move, now: float) -> bool:
        """Start a planned move: room at the target is counted, a drop gives up its bytes. False: stale, do not."""
        return self._moves.begin(move, self._advance(now))

    def finish(self, move: Move, now: float, *, ok: bool, reason: str = "") -> list[tuple[EntryKey, Tier]]:
        """End a begun move; returns payloads the caller must drop now. ``ok`` False: the copy did not arrive."""
        now = self._advance(now)
        if not ok:
            self._counters.count_failed(move, reason)
        return self._moves.finish(move, now, ok=ok)

    # -- sessions ----------------------------------------------------------------------------------------------------
    def pin(self, keys: Iterable[EntryKey]) -> None:
        """Keep entries: they may move down and are written through to the slowest tier, but not dropped. Counted.

        Give whole prompts: a block is of no use without those before it. Raises InternalError where one is not held.
        """
        found = [self._table.get(key.id) for key in keys]
        entries = [entry for entry in found if entry is not None and not entry.doomed]
        if len(entries) != len(found):
            raise InternalError("an entry to pin is not held; match and pin under one lock")
        for entry in entries:
            entry.pins += 1
            self._moves.pinned(entry)

    def unpin(self, keys: Iterable[EntryKey]) -> None:
        """Undo one `pin`. Raises InternalError where there was none."""
        for key in keys:
            if not self._table.hold(key.id, 0, -1):
                raise InternalError(f"a {key.kind} of {key.position} tokens is unpinned more often than pinned")

    def ancestry(self, tip: EntryKey) -> list[EntryKey]:
        """The entries from the first block to ``tip`` itself; none where one of them is not held."""
        keys: list[EntryKey] = []
        entry = self._table.get(tip.id)
        while entry is not None and entry.held and not entry.doomed:
            keys.append(entry.key)
            if self._table.is_first(entry.key):
                return keys[::-1]
            entry = self._table.get(entry.key.parent)
        return []

    def own_part(self, tip: EntryKey, others: Collection[EntryId]) -> list[EntryKey]:
        """``tip`` and those of its ancestors that no other prompt goes on from, nor one of ``others``."""
        own = [tip]
        while not self._table.is_first(own[-1]):
            child = own[-1]
            beside = [entry.key for entry in self._table.children(child.parent).values() if entry.key != child]
            parent = self._table.get(child.parent)
            if parent is None or any(key.kind == "block" or key.id in others for key in beside):
                break
            own.append(parent.key)
        return own

    def set_quota(self, salt: bytes, limit_bytes: int | None) -> None:
        """Bytes that a salt's entries may take on each tier; None: what holds for every salt."""
        if limit_bytes is None:
            self._quotas.pop(salt, None)
        else:
            self._quotas[salt] = limit_bytes

    def _quota_of(self, salt: bytes) -> int | None:
        return self._quotas.get(salt, self._quota)

    # -- state -------------------------------------------------------------------------------------------------------
    def stats(self) -> dict[str, object]:
        """Bytes and entries by tier, insertions, losses and moves by reason; JSON-ready."""
        tiers = {
            book.tier: {"bytes": book.used, "limit_bytes": book.limits.limit_bytes, "entries": book.entries}
            for book in self._table.books
        }
        held = sum(bool(entry.refs) for entry in self._table)
        return {"tiers": tiers, "entries": len(self._table), "orphans": len(self._table.orphans), "in_use": held,
                **self._counters.as_dict()}  # fmt: skip

    def check_integrity(self) -> None:
        """Raises InternalError where references, bytes, tree, tiers or policies disagree."""
        self._moves.settle()
        self._table.check_integrity()
        self._reuse.check_integrity()
