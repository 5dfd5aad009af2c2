"""What a replacement policy sees and answers. Policies know statistics and order, never tiers' bytes or payloads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from python_backends.kv.blocks import EntryKey


@dataclass(slots=True, eq=False)
class BlockStats:
    """What is known of one entry; the manager keeps it up to date, policies only read it.

    Times are seconds on the caller's clock. The statistics outlive a move between tiers, and survive a drop for as
    long as the manager remembers the entry.
    """

    key: EntryKey
    inserted: float
    last_use: float
    """Of the newest request that matched or made it."""
    uses: int = 1
    """Requests that matched or made it."""
    gap: float = 0.0
    """Seconds between the two newest uses; 0 before the second."""
    behind: int = 0
    """Entries of the newest request's prompt behind this one: 0 for its last."""
    mass: float | None = None
    """Attention received, relative to the mean of its prompt's blocks (1.0 = as much as any other), averaged over the
    newest uses; None where it was never measured."""
    recompute_s: float = 0.0
    """Seconds to compute it again, its predecessors given."""
    children: int = 0
    """Entries that are held anywhere and cannot be used without this one."""
    slot: dict[str, object] = field(default_factory=dict)


class Policy(Protocol):
    """Order of eviction in one tier. Called under the cache's lock; every call amortised O(log entries).

    Only leaves leave: an entry in the tier that has a child in the same tier is *shielded*, since the child would be
    useless without it. The manager says when an entry becomes a leaf of the tier and when it stops being one.
    """

    @property
    def name(self) -> str:
        """As in the configuration."""
        ...

    def on_insert(self, entry: BlockStats, now: float) -> None:
        """It came into the tier, new or from another tier."""
        ...

    def on_access(self, entry: BlockStats, now: float) -> None:
        """A request used it; its statistics are those after the use."""
        ...

    def on_remove(self, entry: BlockStats, now: float, *, evicted: bool) -> None:
        """It left the tier: ``evicted`` by the policy's own choice, or else erased, lost or moved up."""
        ...

    def on_shield(self, entry: BlockStats) -> None:
        """It has a child in the tier now."""
        ...

    def on_expose(self, entry: BlockStats, now: float) -> None:
        """Its last child left the tier."""
        ...

    def victims(self, now: float) -> Iterator[BlockStats]:
        """Leaves of the tier, the one to evict first in front. The tier may change while this is iterated only by
        the removal of what it gave."""
        ...

    def check_integrity(self) -> None:
        """Raises InternalError where the policy's own structures disagree."""
        ...
