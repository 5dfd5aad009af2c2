"""Requests through the real manager; only compute, copies and the clock are simulated."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from client.bench.cache.baselines import ARC, LHD, S3FIFO, Belady
from client.bench.cache.workloads import BLOCK_TOKENS, Request
from python_backends.config import Config
from python_backends.kv.blocks import TIERS, EntryId, Move, Tier, TierLimits
from python_backends.kv.manager import KvManager
from python_backends.kv.policies import PolicySet, make_policies, makers
from python_backends.kv.policies.base import Policy
from python_backends.kv.policies.reuse import ReuseModel

PREFILL_TOKENS_PER_S = 13_000.0
"""Of the 27B shape in bf16 on an H200, as measured there with vLLM (docs/design.md, section 7)."""
BLOCK_BYTES = 81_920 * BLOCK_TOKENS
"""Global layers of the 27B shape in bf16."""
LOAD_BYTES_PER_S: Mapping[Tier, float] = {"device": float("inf"), "host": 50e9, "nvme": 2.1e9}
SHARES: Mapping[int, Mapping[Tier, float]] = {
    1: {"device": 1.0},
    2: {"device": 0.2, "host": 0.8},
    3: {"device": 0.1, "host": 0.3, "nvme": 0.6},
}
"""How a capacity is divided between tiers."""
POLICIES = ("a2cr", "lru", "lfu", "arc", "s3fifo", "lhd", "belady")
MOVES_AT_ONCE = 4096


@dataclass
class Outcome:
    """One replay."""

    policy: str
    tiers: int
    capacity: int
    """Blocks, in all tiers."""
    requests: int
    token_hit_rate: float
    """Prompt tokens that were held ÷ all prompt tokens."""
    late_hit_rate: float
    """The same over the second half of the requests."""
    ttft_mean_s: float
    """Loads and prefill of a request alone, without waiting."""
    ttft_p50_s: float
    moved_down: int
    """Blocks that were demoted."""
    cpu_us_per_block: float
    """Of the manager and the policy, per prompt block."""

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


def future_uses(requests: Sequence[Request]) -> dict[EntryId, list[float]]:
    """For each block the times it is asked for."""
    uses: dict[EntryId, list[float]] = {}
    for request in requests:
        for key in request.keys:
            insort(uses.setdefault(key.id, []), request.time)
    return uses


def policy_set(
    name: str, limits: Mapping[Tier, TierLimits], requests: Sequence[Request], attention_weight: float
) -> PolicySet:
    """The server's policies, and those that are only here to compare with."""
    if name in makers():
        return make_policies(name, limits, attention_weight=attention_weight)
    uses = future_uses(requests) if name == "belady" else {}
    others: dict[str, Callable[[int], Policy]] = {
        "belady": lambda blocks: Belady(uses),
        "lhd": lambda blocks: LHD(),
        "s3fifo": S3FIFO,
        "arc": ARC,
    }
    return PolicySet({tier: others[name](limits[tier].limit_bytes) for tier in limits}, ReuseModel())


def replay(
    requests: Sequence[Request],
    policy: str,
    capacity: int,
    tiers: int,
    attention_weight: float = Config.hmt_attention_weight,
) -> Outcome:
    """Serve the requests one after the other, each done before the next arrives."""
    limits = {tier: TierLimits(max(1, round(capacity * share)), 0.95, 0.90) for tier, share in SHARES[tiers].items()}
    policies = policy_set(policy, limits, requests, attention_weight)
    manager = KvManager(limits, policies, block_tokens=BLOCK_TOKENS, needs_tails=False)
    hits, waits = [], []
    begin = time.process_time()
    for request in requests:
        found, wait = serve(manager, request, several=tiers > 1)
        hits.append(found)
        waits.append(wait)
    spent = time.process_time() - begin
    blocks = [len(request.keys) for request in requests]
    half = len(requests) // 2
    moved = manager.stats()["moves"]
    assert isinstance(moved, dict)
    return Outcome(
        policy=policy,
        tiers=tiers,
        capacity=capacity,
        requests=len(requests),
        token_hit_rate=sum(hits) / sum(blocks),
        late_hit_rate=sum(hits[half:]) / sum(blocks[half:]),
        ttft_mean_s=sum(waits) / len(waits),
        ttft_p50_s=sorted(waits)[len(waits) // 2],
        moved_down=sum(count for label, count in moved.items() if label.endswith("/demote")),
        cpu_us_per_block=spent / sum(blocks) * 1e6,
    )


def serve(manager: KvManager, request: Request, *, several: bool) -> tuple[int, float]:
    """(blocks found, seconds to the first token) of one request, whose blocks are kept."""
    now = request.time
    match = manager.match(request, len(request), now)
    manager.acquire(match.blocks)
    visit = manager.touch(match.blocks, now)
    held = list(match.blocks)
    recompute_s = BLOCK_TOKENS / PREFILL_TOKENS_PER_S
    slower = [key for key, tier in zip(match.blocks, match.block_tiers, strict=True) if tier != "device"]
    for key in (*slower, *request.keys[len(held) :]):
        insert = manager.insert(key, "device", now, visit=visit, recompute_s=recompute_s)
        for move in insert.evict:
            manager.finish(move, now, ok=True)
        if key.position > match.length:
            if not insert.accepted:
                break
            manager.acquire((key,))
            held.append(key)
    if request.masses:
        manager.observe(request.keys, request.masses)
    manager.release(held)
    visit.answer = request.answer
    if several:
        carry_out(manager, manager.plan_moves(now, MOVES_AT_ONCE), now)
    loading = sum(BLOCK_BYTES / LOAD_BYTES_PER_S[tier] for tier in match.block_tiers)
    computed = max(1, len(request) - match.length)  # one token has to be computed to draw the next
    return len(match.blocks), loading + computed / PREFILL_TOKENS_PER_S


def carry_out(manager: KvManager, moves: Sequence[Move], now: float) -> None:
    """Copies take no time here."""
    for move in moves:
        if manager.begin(move, now):
            manager.finish(move, now, ok=True)


__all__ = ["POLICIES", "SHARES", "TIERS", "Outcome", "replay"]
