"""From the configuration to a KV cache: which tiers there are, and how large."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from python_backends.config import Config
from python_backends.errors import TierError
from python_backends.kv.admission import WorthWriting
from python_backends.kv.blocks import Tier, TierLimits
from python_backends.kv.cache import KvCache
from python_backends.kv.defragmenter import Defragmenter
from python_backends.kv.manager import KvManager
from python_backends.kv.mover import Mover
from python_backends.kv.policies import make_policies
from python_backends.kv.tiers.arena import Arena, alignment_for
from python_backends.kv.tiers.base import MemoryStore, TierStore
from python_backends.kv.tiers.codec import make_codec
from python_backends.kv.tiers.coded import CodedArena
from python_backends.kv.tiers.memory import Memory, plain_memory
from python_backends.kv.tiers.nvme import NvmeStore
from python_backends.runtime.base import KvLayout

log = logging.getLogger("wicore")

DEVICE_SHARE = 1 / 3
"""Of the memory for kept KV, what the device tier gets where device and host are the same memory."""
FEWEST_TAILS = 4
"""A tier that does not hold so many tails is not worth having."""


def open_cache(
    layout: KvLayout,
    fingerprint: str,
    config: Config,
    memory_limit: int,
    *,
    device_share: float = DEVICE_SHARE,
    allocate: Callable[[int], Memory] = plain_memory,
) -> KvCache | None:
    """The cache that a configuration asks for; None where memory does not suffice.

    Args:
        layout: of the runtime.
        fingerprint: what else the KV depends on: weights, precision, kernels.
        config: the ``hmt_…``, ``kv_…`` and ``nvme_…`` keys.
        memory_limit: bytes for the tiers in memory together.
        device_share: of them for the device tier; with 0 there is none.
        allocate: where they come from; page-locked for a runtime whose slots are on a GPU.

    Raises:
        ConfigError: no such policy, an NVMe limit that is too small, or a precision that the layout cannot be kept in.
    """
    largest = layout.largest_tail_bytes
    sizes: dict[Tier, int] = {"device": int(memory_limit * device_share)}
    sizes["host"] = memory_limit - sizes["device"]
    sizes = {tier: size for tier, size in sizes.items() if size}
    if min(sizes.values(), default=0) < FEWEST_TAILS * largest:
        log.warning(
            "no KV cache: %.3g GB of memory do not hold %d entries of %.3g GB; raise cpu_memory_gb or kv_cache_share",
            memory_limit / 1e9,
            FEWEST_TAILS,
            largest / 1e9,
        )
        return None
    # Entries reach the disk from the host, so both precisions are part of what they are.
    rounded = {config.kv_host_precision, config.kv_nvme_precision} != {"as-is"}
    if rounded:
        fingerprint += f"/host-{config.kv_host_precision}/nvme-{config.kv_nvme_precision}"
    memory: dict[Tier, MemoryStore] = {
        tier: _open_memory(tier, size, layout, config, allocate) for tier, size in sizes.items()
    }
    stores: dict[Tier, TierStore] = {**memory}
    nvme = _open_nvme(layout, fingerprint, config, largest)
    if nvme is not None:
        stores["nvme"] = nvme
    highs = {"device": config.hmt_gpu_threshold, "host": config.hmt_cpu_threshold, "nvme": 1.0}
    limits = {
        tier: TierLimits(store.usable_bytes, high=highs[tier], low=highs[tier] - 0.05) for tier, store in stores.items()
    }
    mover = Mover(stores)
    policies = make_policies(
        config.hmt_eviction_policy,
        limits,
        decay_factor=config.hmt_decay_factor,
        attention_weight=config.hmt_attention_weight,
    )
    manager = KvManager(
        limits,
        policies,
        WorthWriting(policies.reuse, mover.speeds, config.nvme_daily_writes_gb * 1e9 or None),
        block_tokens=layout.block_tokens,
        needs_tails=layout.local_bytes > 0,
        quota_bytes=int(config.kv_salt_quota_gb * 1e9) or None,
    )
    for tier, store in stores.items():
        log.info("KV cache: %s tier of %.3g GB", tier, store.usable_bytes / 1e9)
    sessions = None if nvme is None else Path(config.nvme_path) / "sessions.json"
    return KvCache(
        layout,
        fingerprint,
        manager,
        stores,
        memory,
        mover,
        session_file=sessions,
        defragmenter=Defragmenter(list(memory.values()), largest),
        prefetch_tokens=config.prefetch_size,
    )


def _open_memory(
    tier: Tier, limit_bytes: int, layout: KvLayout, config: Config, allocate: Callable[[int], Memory]
) -> Arena | CodedArena:
    codec = make_codec(config.kv_host_precision, layout.dtype) if tier == "host" else None
    block = layout.block_bytes if codec is None else codec.stored_bytes(layout.block_bytes)
    arena = Arena(tier, limit_bytes, alignment=alignment_for(block), allocate=allocate)
    return arena if codec is None else CodedArena(arena, codec, layout.block_bytes)


def _open_nvme(layout: KvLayout, fingerprint: str, config: Config, largest: int) -> NvmeStore | None:
    """The tier on disk; a folder that cannot be used costs the tier, never the server."""
    if not config.nvme_path or not config.nvme_memory_gb:
        return None
    try:
        return NvmeStore(
            Path(config.nvme_path),
            int(config.nvme_memory_gb * 1e9),
            fingerprint=f"{fingerprint}/{layout.identity}".encode(),
            block_bytes=layout.block_bytes,
            largest_bytes=largest,
            codec=make_codec(config.kv_nvme_precision, layout.dtype),
            free_floor_bytes=int(config.nvme_free_floor_gb * 1e9),
            write_budget_bytes=int(config.nvme_daily_writes_gb * 1e9) or None,
        )
    except TierError as error:
        log.warning("no NVMe tier: %s", error.message)
        return None
