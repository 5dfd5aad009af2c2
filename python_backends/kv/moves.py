"""Which entries move, where to, and what is in flight: the part of `KvManager` that decides about room."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing

from python_backends.errors import InternalError
from python_backends.kv.admission import Admission
from python_backends.kv.backoff import Backoff
from python_backends.kv.blocks import EntryId, EntryKey, MissReason, Move, MoveReason, Tier
from python_backends.kv.counters import Counters
from python_backends.kv.entries import BIT, FASTEST, Entry, EntryTable, TierBook


class Moves:
    """Used by `KvManager` alone; times never fall."""

    def __init__(
        self,
        table: EntryTable,
        admission: Admission | None,
        counters: Counters,
        quota_of: Callable[[bytes], int | None] = lambda _: None,
    ) -> None:
        self._table = table
        self._quota_of = quota_of
        self._admission = admission
        self._counters = counters
        self._streams: dict[Tier, tuple[float, Generator[Entry]]] = {}
        self._dropping: dict[tuple[EntryId, Tier], None] = {}
        """Payloads whose bytes are given up but which the caller has not dropped yet: nothing may be put there."""
        self._unsaved: dict[Entry, None] = {}
        """Pinned entries that may lack a copy on the slowest tier."""
        self._backoff = Backoff()

    def is_dropping(self, entry_id: EntryId, tier: Tier) -> bool:
        """Whether an earlier payload of that entry still waits to be dropped there."""
        return (entry_id, tier) in self._dropping

    # -- room at once ------------------------------------------------------------------------------------------------
    def make_room(self, book: TierBook, key: EntryKey, quota: int | None, now: float) -> tuple[bool, tuple[Move, ...]]:
        """Whether ``key`` fits on the tier and within its salt's quota after these moves, which have begun."""
        begun: list[Move] = []
        size = key.num_bytes
        if quota is not None and book.by_salt.get(key.salt, 0) + size > quota:
            self._evict_own(book, key, quota - size, now, begun)
            if book.by_salt.get(key.salt, 0) + size > quota:
                return False, tuple(begun)
        if book.free < size <= book.limits.limit_bytes:
            self._evict(book, size, now, begun)
        return book.free >= size, tuple(begun)

    def _evict_own(self, book: TierBook, key: EntryKey, quota: int, now: float, begun: list[Move]) -> None:
        """Begin moves of the salt's own entries until at most ``quota`` bytes are left."""
        self.settle()
        with closing(self._victims(book, now)) as victims:
            for entry in victims:
                if entry.key.salt == key.salt and self._can_go(entry, book):
                    self._push_out(entry, book, now, begun)
                    if book.by_salt.get(key.salt, 0) <= quota:
                        return

    def _evict(self, book: TierBook, size: int, now: float, begun: list[Move]) -> None:
        """Begin moves until ``size`` bytes are free."""
        for entry in self._stream(book, now):
            if self._can_go(entry, book):
                self._push_out(entry, book, now, begun)
                if book.free >= size:
                    return
        self.settle()
        # Nothing else goes: parents of entries on slower tiers, which are orphans then.
        for entry in list(self._victims(book, now)):
            if not entry.pins and entry.held & book.bit and self._is_free(entry):
                self._push_out(entry, book, now, begun)
                if book.free >= size:
                    return

    def _stream(self, book: TierBook, now: float) -> Generator[Entry]:
        """The tier's victims, from where the insertion before went on if it was of the same moment: entries come many
        at a time."""
        found = self._streams.get(book.tier)
        if found is None or found[0] != now:
            if found is not None:
                found[1].close()
            found = self._streams[book.tier] = (now, self._victims(book, now))
        return found[1]

    def settle(self) -> None:
        """Give back to the policies what `_stream` has taken out to look at."""
        for _, stream in self._streams.values():
            stream.close()
        self._streams.clear()

    def _victims(self, book: TierBook, now: float) -> Generator[Entry]:
        """Entries that may leave the tier, first those that are of no use at all."""
        if self._table.orphans:
            for entry in list(self._table.orphans):
                if entry.held & book.bit and self._is_free(entry):
                    yield entry
        with closing(book.policy.victims(now)) as victims:
            for victim in victims:
                if isinstance(victim, Entry) and self._is_free(victim):
                    yield victim

    def _runs(self, book: TierBook, now: float) -> Generator[Entry]:
        """Victims that stay where they are while more are chosen: an ancestor takes its place among the others as soon
        as it would be a leaf without those given before it."""
        given: set[Entry] = set()
        exposed: list[tuple[tuple[float, ...], int, Entry]] = []
        with closing(self._victims(book, now)) as victims:
            leaves = ((self._rank(victim, book, now), victim) for victim in victims)
            leaf = next(leaves, None)
            while leaf is not None or exposed:
                if leaf is not None and (not exposed or leaf[0] < exposed[0][0]):
                    entry, leaf = leaf[1], next(leaves, None)
                else:
                    entry = heapq.heappop(exposed)[2]
                if entry in given:
                    continue
                yield entry
                given.add(entry)
                parent = self._table.get(entry.key.parent)
                if parent is not None and self._would_be_leaf(parent, book, given):
                    heapq.heappush(exposed, (book.policy.rank(parent, now), len(given), parent))

    def _rank(self, entry: Entry, book: TierBook, now: float) -> tuple[float, ...]:
        """Orphans stand in front of all others."""
        return (-math.inf,) if entry in self._table.orphans else book.policy.rank(entry, now)

    def _would_be_leaf(self, entry: Entry, book: TierBook, given: set[Entry]) -> bool:
        """Whether it is a victim of the tier once the entries of ``given`` have left."""
        if not entry.held & book.bit or not self._is_free(entry):
            return False
        near = sum(entry.near[: book.index + 1])
        if near <= 1:  # the one just given
            return True
        children = self._table.children(entry.key.id).values()
        return all(child in given for child in children if FASTEST[child.present] <= book.index)

    @staticmethod
    def _is_free(entry: Entry) -> bool:
        return not entry.refs and entry.moving is None

    def _can_go(self, entry: Entry, book: TierBook) -> bool:
        """Whether it can leave the tier without leaving its children or a session without it."""
        if not (entry.held & ~book.bit or entry.pins or any(entry.near)):
            return True
        if entry.held & ~book.bit or entry.pins:  # a copy that fails would lose a pinned one
            return bool(entry.held & ~book.bit)
        return self._landing(entry, book) is not None or entry in self._table.orphans

    def _landing(self, entry: Entry, book: TierBook) -> TierBook | None:
        """The next tier, where an entry that is wanted in memory at once could go: disks are too slow for that."""
        below = self._table.below(book)
        if below is None or below.tier == "nvme" or entry in self._table.orphans or below.free < entry.key.num_bytes:
            return None
        if self._spent(entry.key, below):
            return None
        return below

    def _push_out(self, entry: Entry, book: TierBook, now: float, begun: list[Move]) -> None:
        """Begin the moves that give up the entry's place on the tier at once: down, where memory is below, in the place
        of what is worth least there, or else away."""
        below = None if entry.held & ~book.bit or entry in self._table.orphans else self._table.below(book)
        size = entry.key.num_bytes
        if below is not None and below.tier != "nvme" and below.free < size <= below.limits.limit_bytes:
            self._spill(below, size, now, begun)
        below = None if entry.held & ~book.bit else self._landing(entry, book)
        if below is None:
            begun.append(self._begin_drop(entry, book.tier, self._drop_reason(entry, book), now))
            return
        move = Move(entry.key, book.tier, below.tier, "demote")
        self._table.place(entry, entry.held & ~book.bit, below.bit, now, evicted=True)
        entry.moving = move
        self._dropping[entry.key.id, book.tier] = None
        begun.append(move)

    def _spill(self, book: TierBook, size: int, now: float, begun: list[Move]) -> None:
        """Drop what is worth least on the tier until ``size`` bytes are free, or nothing more can be dropped."""
        for entry in self._stream(book, now):
            if entry.held & ~book.bit or not (entry.pins or any(entry.near)):
                begun.append(self._begin_drop(entry, book.tier, self._drop_reason(entry, book), now))
                if book.free >= size:
                    return

    def _drop_reason(self, entry: Entry, book: TierBook) -> MoveReason:
        if entry in self._table.orphans:
            return "orphan"
        return "duplicate" if entry.held & ~book.bit else "drop"

    def _begin_drop(self, entry: Entry, tier: Tier, reason: MoveReason, now: float) -> Move:
        gone: MissReason = "erased" if reason == "erase" else "evicted"
        self._dropping[entry.key.id, tier] = None
        self._table.place(entry, entry.held & ~BIT[tier], entry.arriving, now, reason=gone, evicted=reason != "erase")
        return Move(entry.key, tier, None, reason)

    # -- room in time ------------------------------------------------------------------------------------------------
    def plan(self, now: float, limit: int) -> list[Move]:
        """See `KvManager.plan_moves`. Nothing is begun but the drops of erased entries that are free now."""
        self.settle()
        moves = self._plan_doomed()
        moves += self._plan_saves(now, limit - len(moves))
        for book in reversed(self._table.books):
            below = self._table.below(book)
            if below is not None and len(moves) < limit:
                moves += self._plan_down(book, below, now, limit - len(moves))
        return moves[:limit]

    def _plan_doomed(self) -> list[Move]:
        return [
            Move(entry.key, book.tier, None, "erase")
            for entry in self._table.doomed
            if self._is_free(entry)
            for book in self._table.books
            if entry.held & book.bit
        ]

    def _plan_saves(self, now: float, limit: int) -> list[Move]:
        """Copies of pinned entries on the slowest tier, so that a session outlives this process."""
        last = self._table.books[-1]
        if not self._unsaved or self._backoff.is_paused(last.tier, now):
            return []
        moves: list[Move] = []
        for entry in list(self._unsaved):
            if not entry.pins or not entry.present or entry.present & last.bit:
                del self._unsaved[entry]
            elif entry.held and entry.moving is None and len(moves) < limit and not self._spent(entry.key, last):
                moves += self._room_below(last, entry.key.num_bytes * (len(moves) + 1), now)
                moves.append(Move(entry.key, entry.fastest(), last.tier, "write_through", keep_source=True))
        return moves

    def plan_save(self, keys: Sequence[EntryKey], now: float) -> list[Move]:
        """See `KvManager.plan_save`."""
        self.settle()
        last, moves = self._table.books[-1], []
        for key in keys:
            entry = self._table.get(key.id)
            if entry and entry.held and entry.moving is None and not entry.present & last.bit:
                moves.append(Move(key, entry.fastest(), last.tier, "write_through", keep_source=True))
        return [*self._room_below(last, sum(move.key.num_bytes for move in moves), now), *moves]

    def _spent(self, key: EntryKey, book: TierBook) -> bool:
        """Whether the entry's salt may take no more of the tier."""
        quota = self._quota_of(key.salt)
        return quota is not None and book.by_salt.get(key.salt, 0) + key.num_bytes > quota

    def _plan_down(self, book: TierBook, below: TierBook, now: float, limit: int) -> list[Move]:
        """Bring a tier above its high watermark down to the low one."""
        limits = book.limits
        if book.used <= limits.high * limits.limit_bytes:
            return []
        moves: list[Move] = []
        surplus = book.used - limits.low * limits.limit_bytes
        wanted_below = 0
        paused = self._backoff.is_paused(below.tier, now)
        with closing(self._runs(book, now)) as victims:
            for entry in victims:
                if surplus <= 0 or len(moves) >= limit:
                    break
                if entry.held & ~book.bit or entry in self._table.orphans:
                    moves.append(Move(entry.key, book.tier, None, self._drop_reason(entry, book)))
                elif self._admitted(entry, below, now):
                    if paused:
                        continue
                    wanted_below += entry.key.num_bytes
                    moves.append(Move(entry.key, book.tier, below.tier, "demote"))
                elif not entry.pins and not any(entry.near):
                    moves.append(Move(entry.key, book.tier, None, "drop"))
                else:
                    continue
                surplus -= entry.key.num_bytes
        return [*self._room_below(below, wanted_below, now), *moves]

    def _admitted(self, entry: Entry, below: TierBook, now: float) -> bool:
        """NVMe is asked about; pinned entries and parents of what is there go anyway. Nobody goes beyond a quota."""
        if self._spent(entry.key, below):
            return False
        if below.tier != "nvme" or self._admission is None or entry.pins or any(entry.near):
            return True
        return self._admission.admits(entry, now)

    def _room_below(self, book: TierBook, needed: int, now: float) -> list[Move]:
        """Drops that free ``needed`` bytes on the slowest tier; other tiers make their own room by watermark."""
        if self._table.below(book) is not None:
            return []
        return self._plan_drops(book, needed - book.free, now)

    def _plan_drops(
        self, book: TierBook, missing: int, now: float, spare: Collection[bool] = (True, False)
    ) -> list[Move]:
        """Drops of what is worth least on the tier, of at least ``missing`` bytes where that can be: spare copies
        (True), and what nobody pinned and nothing that stays depends on (False)."""
        moves: list[Move] = []
        if missing <= 0:
            return moves
        going: Counter[EntryId] = Counter()
        with closing(self._runs(book, now)) as victims:
            for entry in victims:
                if missing <= 0:
                    break
                is_spare = bool(entry.held & ~book.bit)
                needed = not is_spare and (entry.pins or sum(entry.near) > going[entry.key.id])
                if needed or is_spare not in spare:
                    continue
                moves.append(Move(entry.key, book.tier, None, self._drop_reason(entry, book)))
                missing -= entry.key.num_bytes
                going[entry.key.parent] += not is_spare
        return moves

    def plan_prefetch(self, keys: Sequence[EntryKey], book: TierBook, now: float) -> list[Move]:
        """See `KvManager.plan_prefetch`."""
        self.settle()
        wanted = []
        for key in keys:
            entry = self._table.get(key.id)
            if entry and entry.held and entry.moving is None and BIT[entry.fastest()] > book.bit:
                wanted.append(Move(key, entry.fastest(), book.tier, "promote", keep_source=True))
        missing = sum(move.key.num_bytes for move in wanted) - book.free
        drops: list[Move] = []
        for spare in (True, False):  # others, too: somebody waits, and moving them down would take a disk's time
            found = self._plan_drops(book, missing, now, (spare,))
            missing -= sum(move.key.num_bytes for move in found)
            drops += found
        while wanted and missing > 0:  # the end can be computed while the beginning is loaded
            missing -= wanted.pop().key.num_bytes
        return drops + wanted

    def pinned(self, entry: Entry) -> None:
        """It is pinned now."""
        self._unsaved[entry] = None

    # -- carrying out ------------------------------------------------------------------------------------------------
    def begin(self, move: Move, now: float) -> bool:
        """See `KvManager.begin`."""
        entry = self._table.get(move.key.id)
        if entry is None or not entry.held & BIT[move.source] or entry.moving is not None:
            return False
        if entry.refs and not move.keep_source:
            return False
        if move.target is None:
            elsewhere = entry.held & ~BIT[move.source]
            if not elsewhere and (move.reason == "duplicate" or (entry.pins and move.reason != "erase")):
                return False
            self._begin_drop(entry, move.source, move.reason, now)
            return True
        target = self._table.book(move.target)
        fits = target.free >= move.key.num_bytes and (entry.key.id, move.target) not in self._dropping
        if entry.present & target.bit or entry.doomed or not fits or self._spent(entry.key, target):
            return False
        self._table.place(entry, entry.held, target.bit, now)
        entry.moving = move
        return True

    def end_drop(self, move: Move) -> None:
        """The caller drops the payload at the source now."""
        self._dropping.pop((move.key.id, move.source), None)

    def finish(self, move: Move, now: float, *, ok: bool) -> list[tuple[EntryKey, Tier]]:
        """See `KvManager.finish`."""
        if ok:
            self._counters.count_move(move)
        drops = [(move.key, move.source)] if (move.key.id, move.source) in self._dropping else []
        self.end_drop(move)
        if move.target is None:
            return drops
        self._backoff.note(move.target, now, ok=ok)
        entry = self._table.get(move.key.id)
        if entry is None or entry.moving != move:
            raise InternalError(f"a move {move.source}>{move.target} ended that had not begun")
        entry.moving = None
        held = entry.held | (BIT[move.target] if ok else 0)
        # What failed to go down was chosen to go: it makes room all the same, unless someone needs it.
        leaves = (ok and not move.keep_source) or (not ok and move.reason == "demote" and not entry.pins)
        if leaves and held & BIT[move.source] and not entry.refs and not (not ok and any(entry.near)):
            held &= ~BIT[move.source]
            drops.append((move.key, move.source))
        self._table.place(entry, held, 0, now, reason="evicted" if entry.held else "lost", evicted=True)
        return drops

    # -- erasing -----------------------------------------------------------------------------------------------------
    def doom(self, entry: Entry) -> None:
        """It cannot be matched any more and goes as soon as nobody uses it."""
        entry.doomed = True
        self._table.doomed[entry] = None

    def reap(self, now: float) -> list[Move]:
        """Begin the drops of all erased entries that are free."""
        return [move for move in self._plan_doomed() if self.begin(move, now)]
