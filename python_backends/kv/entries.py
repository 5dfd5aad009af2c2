"""The entries there are: a forest of blocks and tails, and for each tier its bytes, its leaves and its policy.

Invariants, all of them in `EntryTable.check_integrity`:
- An entry is in the table while a tier holds it or it is on its way to one; then a ghost of it is kept for a while.
- Bytes of a tier are those of the entries it holds and of those on their way to it, and never above its limit.
- A tier's policy knows exactly the entries the tier holds. Shielded in a tier is an entry with a child that is held (or
  arriving) there or on a faster tier.
- An entry whose parent is neither a root nor in the table is an orphan: of no use until the parent is back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from python_backends.errors import InternalError
from python_backends.kv.blocks import TIERS, EntryId, EntryKey, MissReason, Move, Tier, TierLimits
from python_backends.kv.policies.base import BlockStats, Policy

BIT: dict[Tier, int] = {tier: 1 << index for index, tier in enumerate(TIERS)}
NOWHERE = len(TIERS)
FASTEST = tuple(next((index for index in range(NOWHERE) if mask >> index & 1), NOWHERE) for mask in range(1 << NOWHERE))
"""Index of the fastest tier in a mask of tiers."""
MIN_GHOSTS = 262_144


@dataclass(slots=True, eq=False)
class Entry(BlockStats):
    """What the manager knows beside the statistics. Only `EntryTable` writes ``held``, ``arriving`` and ``near``."""

    held: int = 0
    """Mask of the tiers whose payload can be read."""
    arriving: int = 0
    """Bit of the tier that a move in flight writes to, or 0."""
    near: list[int] = field(default_factory=lambda: [0] * (NOWHERE + 1))
    """Children by the fastest tier they are held on or arrive at."""
    refs: int = 0
    pins: int = 0
    moving: Move | None = None
    doomed: bool = False
    """Erased while in use: goes as soon as it can."""

    @property
    def present(self) -> int:
        """Mask of the tiers whose bytes it takes."""
        return self.held | self.arriving

    def fastest(self) -> Tier:
        """The tier to read it from."""
        return TIERS[FASTEST[self.held]]

    def is_shielded(self, index: int) -> bool:
        """Whether a child is held on the tier of that index, or on a faster one."""
        return any(self.near[: index + 1])


@dataclass
class TierBook:
    """One tier's account."""

    tier: Tier
    index: int
    limits: TierLimits
    policy: Policy
    used: int = 0
    entries: int = 0
    by_salt: dict[bytes, int] = field(default_factory=dict)
    bit: int = field(init=False)
    """In masks of tiers."""

    def __post_init__(self) -> None:
        self.bit = 1 << self.index

    @property
    def free(self) -> int:
        """Bytes."""
        return self.limits.limit_bytes - self.used

    def count(self, key: EntryKey, sign: int) -> None:
        """Add (1) or subtract (−1) an entry's bytes."""
        size = sign * key.num_bytes
        self.used += size
        self.entries += sign
        left = self.by_salt.get(key.salt, 0) + size
        if left:
            self.by_salt[key.salt] = left
        else:
            self.by_salt.pop(key.salt, None)


class EntryTable:
    """See the module."""

    def __init__(self, limits: Mapping[Tier, TierLimits], policies: Mapping[Tier, Policy], block_tokens: int) -> None:
        self.books = [TierBook(tier, index, limits[tier], policies[tier]) for index, tier in enumerate(TIERS)
                      if tier in limits]  # fmt: skip
        self._block_tokens = block_tokens
        self._entries: dict[EntryId, Entry] = {}
        self._children: dict[EntryId, dict[EntryId, Entry]] = {}
        self._ghosts: OrderedDict[EntryId, tuple[Entry, MissReason]] = OrderedDict()
        self._left_holds: dict[EntryId, tuple[int, int]] = {}
        """References and pins of entries that were lost or erased under their holders."""
        self.orphans: dict[Entry, None] = {}
        self.doomed: dict[Entry, None] = {}
        self.forgotten: list[Entry] = []
        """Ghosts that were given up since this was last emptied."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, entry_id: EntryId) -> Entry | None:
        """The entry, if it is held or arriving anywhere."""
        return self._entries.get(entry_id)

    def ghost(self, entry_id: EntryId) -> tuple[Entry, MissReason] | None:
        """What is remembered of an entry that is gone, and why it is."""
        return self._ghosts.get(entry_id)

    def children(self, entry_id: EntryId) -> dict[EntryId, Entry]:
        """Entries whose parent that is, whether it is held or not."""
        return self._children.get(entry_id, {})

    def book(self, tier: Tier) -> TierBook:
        """A tier's account. Raises InternalError where the cache has no such tier."""
        for book in self.books:
            if book.tier == tier:
                return book
        raise InternalError(f"this cache has no {tier} tier")

    def below(self, book: TierBook) -> TierBook | None:
        """The next slower tier."""
        after = self.books.index(book) + 1
        return self.books[after] if after < len(self.books) else None

    def is_first(self, key: EntryKey) -> bool:
        """Whether the entry's parent is a root."""
        return key.position < self._block_tokens + (key.kind == "block")

    def hold(self, entry_id: EntryId, refs: int, pins: int) -> bool:
        """Change an entry's counts, also those of one that is gone while held. False: they would fall below zero."""
        entry = self._entries.get(entry_id)
        old = (entry.refs, entry.pins) if entry else self._left_holds.get(entry_id, (0, 0))
        new = (old[0] + refs, old[1] + pins)
        if min(new) < 0:
            return False
        if entry:
            entry.refs, entry.pins = new
        elif any(new):
            self._left_holds[entry_id] = new
        else:
            self._left_holds.pop(entry_id, None)
        return True

    def revive(self, key: EntryKey) -> Entry | None:
        """The ghost of that key, taken from memory, for `place`."""
        found = self._ghosts.pop(key.id, None)
        return found[0] if found else None

    def place(
        self, entry: Entry, held: int, arriving: int, now: float, *, reason: MissReason = "", evicted: bool = False
    ) -> None:
        """Where the entry is from now on. Tells the policies, keeps bytes, leaves and orphans right.

        ``reason``: why it is gone, where both masks are 0.
        """
        before, after = entry.present, held | arriving
        if not before and after:
            self._attach(entry)
        old_held, entry.held, entry.arriving = entry.held, held, arriving
        if before != after:
            for book in self.books:
                if (before ^ after) & book.bit:
                    book.count(entry.key, 1 if after & book.bit else -1)
        for book in self.books:
            if (old_held ^ held) & book.bit:
                if held & book.bit:
                    book.policy.on_insert(entry, now)
                    if entry.is_shielded(book.index):
                        book.policy.on_shield(entry)
                else:
                    book.policy.on_remove(entry, now, evicted=evicted)
        if before and FASTEST[before] != FASTEST[after]:
            self._tell_parent(entry, FASTEST[before], FASTEST[after], now)
        elif not before and after:
            self._tell_parent(entry, NOWHERE, FASTEST[after], now)
        if before and not after:
            self._detach(entry, reason)

    def _tell_parent(self, entry: Entry, before: int, after: int, now: float) -> None:
        """The entry's fastest tier changed (NOWHERE: not in the table)."""
        parent = self._entries.get(entry.key.parent)
        if parent is None:
            return
        near = parent.near
        if before != NOWHERE:
            near[before] -= 1
        if after != NOWHERE:
            near[after] += 1
        for book in self.books:
            if not parent.held & book.bit:
                continue
            others = sum(near[: book.index + 1]) - (after <= book.index)
            if others:  # shielded with and without this child
                continue
            if after <= book.index < before:
                book.policy.on_shield(parent)
            elif before <= book.index < after:
                book.policy.on_expose(parent, now)

    def _attach(self, entry: Entry) -> None:
        key = entry.key
        self._entries[key.id] = entry
        siblings = self._children.get(key.parent)
        if siblings is None:
            self._children[key.parent] = {key.id: entry}
        else:
            siblings[key.id] = entry
        if key.parent not in self._entries and not self.is_first(key):
            self.orphans[entry] = None
        entry.refs, entry.pins = self._left_holds.pop(key.id, (0, 0))
        for child in self.children(key.id).values():
            self.orphans.pop(child, None)
            entry.near[FASTEST[child.present]] += 1

    def _detach(self, entry: Entry, reason: MissReason) -> None:
        key = entry.key
        del self._entries[key.id]
        siblings = self._children[key.parent]
        del siblings[key.id]
        if not siblings:
            del self._children[key.parent]
        self.orphans.pop(entry, None)
        self.orphans.update(dict.fromkeys(self.children(key.id).values()))
        entry.near = [0] * (NOWHERE + 1)
        if entry.refs or entry.pins:
            self._left_holds[key.id] = (entry.refs, entry.pins)
        entry.refs = entry.pins = 0
        entry.moving, entry.doomed = None, False
        self.doomed.pop(entry, None)
        self._ghosts[key.id] = (entry, reason)
        while len(self._ghosts) > max(MIN_GHOSTS, 2 * len(self._entries)):
            self.forgotten.append(self._ghosts.popitem(last=False)[1][0])

    def check_integrity(self) -> None:
        """Raises InternalError where an invariant of the module does not hold."""
        for entry in self:
            self._check_entry(entry)
        for parent, children in self._children.items():
            if not children or any(self._entries.get(key) is not child or child.key.parent != parent
                                   for key, child in children.items()):  # fmt: skip
                raise InternalError(f"children of {parent.hex()} are not those of the table")
        if sum(map(len, self._children.values())) != len(self._entries):
            raise InternalError("an entry is not among its parent's children")
        for book in self.books:
            self._check_book(book)
        if self._ghosts.keys() & self._entries.keys() or self._left_holds.keys() & self._entries.keys():
            raise InternalError("an entry is in the table and said to be gone")

    def _check_entry(self, entry: Entry) -> None:
        key = entry.key
        if self._entries.get(key.id) is not entry or not entry.present or entry.held & entry.arriving:
            raise InternalError(f"entry {key.id.hex()} is held nowhere, or arrives where it is held")
        if bool(entry.arriving) != (entry.moving is not None and entry.moving.target is not None):
            raise InternalError(f"entry {key.id.hex()} arrives without a move")
        near = [0] * (NOWHERE + 1)
        for child in self.children(key.id).values():
            near[FASTEST[child.present]] += 1
        if near != entry.near or min(entry.refs, entry.pins) < 0:
            raise InternalError(f"entry {key.id.hex()} counts {entry.near} children, there are {near}")
        orphan = key.parent not in self._entries and not self.is_first(key)
        if orphan != (entry in self.orphans) or entry.doomed != (entry in self.doomed):
            raise InternalError(f"entry {key.id.hex()} is not in the list of orphans or of erased entries as it should")

    def _check_book(self, book: TierBook) -> None:
        present = [entry for entry in self if entry.present & book.bit]
        used = sum(entry.key.num_bytes for entry in present)
        if used != book.used or len(present) != book.entries or used > book.limits.limit_bytes:
            raise InternalError(f"{book.tier}: {book.used} bytes counted of {used}, limit {book.limits.limit_bytes}")
        by_salt: dict[bytes, int] = {}
        for entry in present:
            by_salt[entry.key.salt] = by_salt.get(entry.key.salt, 0) + entry.key.num_bytes
        if {salt: size for salt, size in by_salt.items() if size} != book.by_salt:
            raise InternalError(f"{book.tier}: bytes by salt do not add up")
        held: set[BlockStats] = {entry for entry in present if entry.held & book.bit}
        leaves: set[BlockStats] = {entry for entry in present
                                   if entry.held & book.bit and not entry.is_shielded(book.index)}  # fmt: skip
        book.policy.check_integrity(held, leaves)
