"""What a replacement policy sees and answers. Policies know statistics and order, never tiers' bytes or payloads."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from python_backends.kv.blocks import EntryKey


@dataclass(slots=True, eq=False)
class Visit:
    """One request's use of the cache, shared by all entries it matched or made.

    A request *continues* the visit before it where it goes on from at least half of what that one reached: the next
    turn of a conversation, a retry, a branch late in a prompt. One that shares no more than a system prompt does not.
    """

    time: float
    matched: int = 0
    """Tokens that were held."""
    end: int = 0
    """Tokens up to and with its last entry so far."""
    turn: int = 1
    """How many visits in a row continued one another."""
    answer: int = 0
    """Tokens of its answer so far; whoever serves the request sets it."""
    lru_bytes: int = 0
    """What LRU would still hold of it (`guard`)."""


@dataclass(slots=True, eq=False)
class BlockStats:
    """What is known of one entry; the manager keeps it up to date, policies only read it.

    Outlives a move between tiers, and survives a drop for as long as the manager remembers the entry.
    """

    key: EntryKey
    visit: Visit
    """The newest that used it."""
    uses: int = 1
    """Visits that used it."""
    life: int = 0
    """`hazards.pack_entry` of what was known of it when its newest life began; kept by the model of reuse."""
    mass: float | None = None
    """Attention received, relative to the mean of its prompt's blocks (1.0 = as much as any other), averaged over the
    newest visits; None where it was never measured."""
    recompute_s: float = 0.0
    """Seconds to compute it again, its predecessors given; 0 where unknown."""


class Policy(Protocol):
    """Order of eviction in one tier. Called under the cache's lock.

    Only leaves leave: an entry with a child in the same tier or a faster one is *shielded*, since the child would be
    useless without it. The manager says when an entry becomes a leaf of the tier and when it stops being one.
    """

    @property
    def name(self) -> str:
        """As in the configuration."""
        ...

    def on_insert(self, entry: BlockStats, now: float) -> None:
        """It came into the tier, new or from another tier; a leaf until `on_shield` says otherwise."""
        ...

    def on_access(self, entry: BlockStats, now: float) -> None:
        """A visit used it; its statistics are those after the use."""
        ...

    def on_remove(self, entry: BlockStats, now: float, *, evicted: bool) -> None:
        """It left the tier: ``evicted`` for room, or else erased, lost or dropped as a duplicate."""
        ...

    def on_shield(self, entry: BlockStats) -> None:
        """It has a child in the tier or a faster one now."""
        ...

    def on_expose(self, entry: BlockStats, now: float) -> None:
        """It has no such child any more."""
        ...

    def victims(self, now: float) -> Generator[BlockStats]:
        """Leaves of the tier, the one to evict first in front.

        While it is iterated the tier may change only by the removal of what it gave and by what that exposes.
        """
        ...

    def rank(self, entry: BlockStats, now: float) -> tuple[float, ...]:
        """Where an entry of the tier would stand among its victims, were it a leaf: lower ones leave first. Empty
        where the policy has no such measure: then a parent leaves right after its last child."""
        ...

    def check_integrity(self, entries: set[BlockStats], leaves: set[BlockStats]) -> None:
        """Raises InternalError where the policy's structures disagree with the tier's entries and leaves."""
        ...
