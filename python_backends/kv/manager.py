"""The book-keeper of the KV cache: what is held where, who uses it, what goes next. No tensors, no clock, no I/O.

One object under the cache's lock. Entries form a forest: a block's parent is the block before it, a tail's parent the
last full block before it, and an entry is of use only while all its ancestors are held somewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from python_backends.kv.admission import Admission
from python_backends.kv.blocks import EntryKey, Insert, Match, Move, Tier, TierLimits
from python_backends.kv.identity import PromptIds
from python_backends.kv.policies.base import Policy


class KvManager:
    """See the module. ``limits`` names the tiers there are, any of `TIERS`; ``policies`` gives each its own policy.

    Every ``now`` is in seconds and may not fall between calls (it is clamped where it does).
    """

    def __init__(
        self, limits: Mapping[Tier, TierLimits], policies: Mapping[Tier, Policy], admission: Admission | None = None
    ) -> None:
        raise NotImplementedError

    # -- lookup ------------------------------------------------------------------------------------------------------
    def match(self, ids: PromptIds, limit: int, now: float) -> Match:
        """The longest beginning of at most ``limit`` tokens that can be resumed exactly. Changes nothing."""
        raise NotImplementedError

    def acquire(self, keys: Iterable[EntryKey]) -> None:
        """Hold entries: while held they are neither evicted nor moved away. Counted; shared between requests.

        Raises InternalError where one is not held on any tier (all or none are acquired).
        """
        raise NotImplementedError

    def release(self, keys: Iterable[EntryKey]) -> None:
        """Undo one `acquire`. Raises InternalError where there was none."""
        raise NotImplementedError

    def touch(self, keys: Sequence[EntryKey], now: float, masses: Sequence[float] | None = None) -> None:
        """A request uses these entries, in prompt order: counts as one reuse of each.

        ``masses``: attention received by each, relative to the mean of the prompt's blocks (1.0 is the mean).
        """
        raise NotImplementedError

    # -- what comes and goes -----------------------------------------------------------------------------------------
    def insert(
        self, key: EntryKey, tier: Tier, now: float, *, mass: float | None = None, recompute_s: float = 0.0
    ) -> Insert:
        """Make room on ``tier`` and count the entry there; the caller has or will put the payload. Parents first.

        Not accepted where room cannot be made (everything held or worth more), its parent is not held, or its salt's
        quota is spent.
        """
        raise NotImplementedError

    def recover(self, keys: Iterable[EntryKey], tier: Tier, now: float) -> list[EntryKey]:
        """Take over what a tier found in its files at start, in any order; returns what does not fit and must go."""
        raise NotImplementedError

    def lost(self, key: EntryKey, tier: Tier, reason: str, now: float) -> None:
        """A tier failed to give the payload back (missing, short, checksum, …): not held there any more; counted."""
        raise NotImplementedError

    def erase(self, keys: Iterable[EntryKey], now: float) -> list[Move]:
        """Forget entries and all that depends on them, held ones as soon as they are released. Moves (drops) have
        begun; `finish` each."""
        raise NotImplementedError

    # -- moves -------------------------------------------------------------------------------------------------------
    def plan_moves(self, now: float, limit: int) -> list[Move]:
        """Up to ``limit`` moves worth making now: down by watermark, write-through of pinned entries, drops."""
        raise NotImplementedError

    def plan_prefetch(self, keys: Sequence[EntryKey], target: Tier, now: float) -> list[Move]:
        """Copies that bring entries up to ``target``, in prompt order; with drops or demotions in front where room
        must be made."""
        raise NotImplementedError

    def begin(self, move: Move, now: float) -> bool:
        """Start a planned move: the entry is held while in flight, room at the target is counted. False: stale."""
        raise NotImplementedError

    def finish(self, move: Move, now: float, *, ok: bool, reason: str = "") -> list[tuple[EntryKey, Tier]]:
        """End a begun move; returns payloads the caller must drop now. ``ok`` False: the copy did not arrive."""
        raise NotImplementedError

    # -- sessions ----------------------------------------------------------------------------------------------------
    def pin(self, keys: Iterable[EntryKey]) -> None:
        """Keep entries and their ancestors: they may move down, but are not dropped from the last tier. Counted."""
        raise NotImplementedError

    def unpin(self, keys: Iterable[EntryKey]) -> None:
        """Undo one `pin`."""
        raise NotImplementedError

    def set_quota(self, salt: bytes, limit_bytes: int | None) -> None:
        """Bytes that a salt's entries may take on each tier; None: no limit but the tier's."""
        raise NotImplementedError

    # -- state -------------------------------------------------------------------------------------------------------
    def stats(self) -> dict[str, object]:
        """Bytes, entries, hits and misses by reason, moves by reason and outcome; JSON-ready."""
        raise NotImplementedError

    def check_integrity(self) -> None:
        """Raises InternalError where references, bytes, tree, tiers or policies disagree."""
        raise NotImplementedError
