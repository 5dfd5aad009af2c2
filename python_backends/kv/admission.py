"""What is worth writing to NVMe at all: expected reuse against a budget of bytes a day."""

from __future__ import annotations

from typing import Protocol

from python_backends.kv.blocks import Tier
from python_backends.kv.policies.base import BlockStats


class Admission(Protocol):
    """Asked before an entry is written to a tier."""

    def admits(self, entry: BlockStats, tier: Tier, now: float) -> bool:
        """Whether to write it; if so the bytes are counted against the budget."""
        ...
