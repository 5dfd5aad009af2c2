"""Which entries leave a tier first: one interface, A²CR and the policies it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from python_backends.errors import ConfigError
from python_backends.kv.blocks import Tier
from python_backends.kv.policies.a2cr import A2CR
from python_backends.kv.policies.base import BlockStats, Policy, Visit
from python_backends.kv.policies.guard import Guard
from python_backends.kv.policies.leaves import LFU, LRU
from python_backends.kv.policies.reuse import ReuseModel

DECAY_FACTOR = 0.01
"""Per second, of the evidence of attention."""


@dataclass(frozen=True)
class PolicySet:
    """A policy for each tier, and the model of reuse that they and the admission share."""

    by_tier: Mapping[Tier, Policy]
    reuse: ReuseModel


Maker = Callable[[ReuseModel], Policy]


def makers(decay_factor: float = DECAY_FACTOR) -> dict[str, Maker]:
    """Policies by the name they have in the configuration."""
    return {
        "a2cr": lambda reuse: A2CR(reuse, decay_factor),
        "lru": lambda reuse: LRU(),
        "lfu": lambda reuse: LFU(),
    }


def make_policies(
    name: str, tiers: Iterable[Tier], *, decay_factor: float = DECAY_FACTOR, capacity_bytes: int | None = None
) -> PolicySet:
    """One policy of that name for each tier.

    ``capacity_bytes``, of all tiers together: what is learned is trusted only as long as it serves better than LRU
    would in one tier of so many; None: always.

    Raises:
        ConfigError: no such policy.
    """
    known = makers(decay_factor)
    if name not in known:
        raise ConfigError(f"there is no cache policy {name!r}; choose one of {', '.join(known)}")
    reuse = ReuseModel(None if capacity_bytes is None else Guard(capacity_bytes))
    return PolicySet({tier: known[name](reuse) for tier in tiers}, reuse)


__all__ = ["A2CR", "BlockStats", "Policy", "PolicySet", "ReuseModel", "Visit", "make_policies", "makers"]
