"""What the KV cache keeps and says about it: entries, tiers, moves. Ids and counts only, no tensors.

Two kinds of entry. A *block* is ``kv_block_tokens`` consecutive tokens of all global layers. A *tail* is what resuming
exactly at position T needs beside the full blocks before T: the newest min(T, window) tokens of all local layers and
the global rows of the partial block. Positions count tokens, times are seconds of one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EntryId = bytes
"""32 bytes, see `identity`."""

Tier = Literal["device", "host", "nvme"]
TIERS: tuple[Tier, ...] = ("device", "host", "nvme")
"""Fastest first."""

EntryKind = Literal["block", "tail"]

MissReason = Literal["", "new", "evicted", "lost", "erased", "in_flight", "no_tail", "slow", "limit"]
"""Why a match ends where it does.

``""``: it does not, everything up to the limit is there. ``new``: the next entry was never kept, as far as is
remembered. ``evicted``, ``lost`` (a tier failed to give it back) and ``erased`` (by command): it was. ``in_flight``: it
is being written and cannot be read yet. ``no_tail``: further blocks are there, but no tail to resume at.
``slow``: it was computed while it, or what lies behind it, was being loaded.
"""

MoveReason = Literal["demote", "promote", "write_through", "drop", "duplicate", "orphan", "erase"]
"""``duplicate``: a copy that another tier holds as well; ``orphan``: an entry whose parent is gone."""


@dataclass(frozen=True, slots=True)
class EntryKey:
    """Names one entry; equal ids mean equal keys."""

    id: EntryId
    kind: EntryKind
    parent: EntryId
    """Id of the block before it, or the root's."""
    position: int
    """Tokens up to and with it."""
    num_bytes: int
    """Of its payload, on every tier."""
    salt: bytes
    """Hash of the request's cache_salt: whose quota it counts to."""


@dataclass(frozen=True, slots=True)
class TierLimits:
    """Bytes of one tier. Moves down begin above ``high`` × limit and end at ``low`` × limit."""

    limit_bytes: int
    high: float = 0.90
    low: float = 0.85


@dataclass(frozen=True, slots=True)
class Move:
    """One payload to copy or to drop. ``target`` None: drop it at ``source``.

    Unless ``keep_source``, the caller drops the payload at the source once `KvManager.finish` returned it.
    """

    key: EntryKey
    source: Tier
    target: Tier | None
    reason: MoveReason
    keep_source: bool = False


@dataclass(frozen=True, slots=True)
class Insert:
    """Answer to `KvManager.insert`.

    ``evict`` are moves that have begun already: carry them out in this order before the payload is written, and
    `finish` each. They give up the source at once, so nobody can match there what they read.
    """

    accepted: bool
    evict: tuple[Move, ...] = ()
    known: bool = False
    """The tier held it before; nothing to write."""


@dataclass(frozen=True, slots=True)
class Match:
    """The longest exact beginning of a prompt that is held."""

    length: int
    """Tokens that need not be computed: all full blocks before it and the tail at it are held."""
    blocks: tuple[EntryKey, ...]
    tail: EntryKey | None
    block_tiers: tuple[Tier, ...]
    """Fastest tier of each block."""
    tail_tier: Tier | None
    missed: MissReason
    """Why it is not longer."""
    deepest_block_match: int
    """Tokens whose blocks are held. Beyond ``length``: a branch point was seen whose tail would be worth keeping."""

    @property
    def keys(self) -> tuple[EntryKey, ...]:
        """Blocks, then the tail: what to acquire."""
        return self.blocks if self.tail is None else (*self.blocks, self.tail)
