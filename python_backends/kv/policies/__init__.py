"""Which entries leave a tier first: one interface, A²CR and the policies it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from python_backends.config import Config
from python_backends.errors import ConfigError
from python_backends.kv.blocks import Tier, TierLimits
from python_backends.kv.policies.a2cr import A2CR
from python_backends.kv.policies.base import BlockStats, Policy, Visit
from python_backends.kv.policies.guard import Guard
from python_backends.kv.policies.leaves import LFU, LRU
from python_backends.kv.policies.reuse import ReuseModel


@dataclass(frozen=True)
class PolicySet:
    """A policy for each tier, and the model of reuse that they and the admission share."""

    by_tier: Mapping[Tier, Policy]
    reuse: ReuseModel


Maker = Callable[[ReuseModel], Policy]


def makers(
    decay_factor: float = Config.hmt_decay_factor, attention_weight: float = Config.hmt_attention_weight
) -> dict[str, Maker]:
    """Policies by the name they have in the configuration."""
    return {
        "a2cr": lambda reuse: A2CR(reuse, decay_factor, attention_weight),
        "lru": lambda reuse: LRU(),
        "lfu": lambda reuse: LFU(),
    }


def make_policies(
    name: str,
    limits: Mapping[Tier, TierLimits],
    *,
    decay_factor: float = Config.hmt_decay_factor,
    attention_weight: float = Config.hmt_attention_weight,
    guarded: bool = True,
) -> PolicySet:
    """One policy of that name for each tier.

    ``guarded``: what is learned is trusted only as long as it serves better than LRU would in one tier that holds as
    much as all of these up to their low watermarks (a single tier: as much as it holds).

    Raises:
        ConfigError: no such policy.
    """
    known = makers(decay_factor, attention_weight)
    if name not in known:
        raise ConfigError(f"there is no cache policy {name!r}; choose one of {', '.join(known)}")
    shares = [1.0] if len(limits) == 1 else [limit.low for limit in limits.values()]
    capacity = sum(share * limit.limit_bytes for share, limit in zip(shares, limits.values(), strict=True))
    reuse = ReuseModel(Guard(int(capacity)) if guarded and name == A2CR.name else None)
    return PolicySet({tier: known[name](reuse) for tier in limits}, reuse)


__all__ = ["A2CR", "BlockStats", "Policy", "PolicySet", "ReuseModel", "Visit", "make_policies", "makers"]
