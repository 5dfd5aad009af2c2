"""KV caches of a few megabytes over the real tiers, for tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from python_backends.kv.blocks import EntryKey, Move, Tier, TierLimits
from python_backends.kv.cache import KvCache
from python_backends.kv.manager import KvManager
from python_backends.kv.policies import make_policies
from python_backends.kv.tiers.arena import Arena, alignment_for
from python_backends.kv.tiers.nvme import NvmeStore
from python_backends.runtime.base import KvLayout

MB = 2**20


def open_cache(
    layout: KvLayout,
    folder: Path | None = None,
    *,
    device: int = 8 * MB,
    host: int = 8 * MB,
    nvme: int = 64 * MB,
    mover: object = None,
    policy: str = "a2cr",
    fingerprint: str = "weights",
    quota: int | None = None,
    clock: Callable[[], float] = time.monotonic,
    **nvme_options: Any,
) -> KvCache:
    """Without ``mover`` every move is over when the call that began it returns."""
    alignment = alignment_for(layout.block_bytes)
    memory = {
        "device": Arena("device", device, alignment=alignment),
        "host": Arena("host", host, alignment=alignment),
    }
    stores = dict(memory)
    if folder is not None:
        stores["nvme"] = NvmeStore(
            folder,
            nvme,
            fingerprint=f"{fingerprint}/{layout.identity}".encode(),
            block_bytes=layout.block_bytes,
            largest_bytes=layout.largest_tail_bytes,
            free_floor_bytes=0,
            **nvme_options,
        )
    limits = {tier: TierLimits(store.usable_bytes) for tier, store in stores.items()}
    manager = KvManager(
        limits,
        make_policies(policy, limits),
        block_tokens=layout.block_tokens,
        quota_bytes=quota,
    )
    sessions = folder and folder / "sessions.json"
    return KvCache(
        layout, fingerprint, manager, stores, memory, mover and mover(stores), clock=clock, session_file=sessions
    )


def demote(cache: KvCache, keys: tuple[EntryKey, ...], source: Tier, target: Tier) -> None:
    """Move entries down now, whatever the watermarks say."""
    for key in keys:
        move = Move(key, source, target, "demote")
        with cache.lock:
            assert cache._carrier.begin([move]) == [move]
        cache._carrier.run(move, 0, 60.0, inline=True)
        assert cache._stores[target].contains(key)
        assert not cache._stores[source].contains(key)


def references(cache: KvCache) -> int:
    """How often entries are held by requests."""
    return sum(entry.refs for entry in cache._manager._table)
