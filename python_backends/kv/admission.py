"""What is worth writing to NVMe at all: expected reuse against a budget of bytes a day."""

from __future__ import annotations

from typing import Protocol

from python_backends.kv.policies.base import BlockStats


class Admission(Protocol):
    """Asked when an entry could be demoted to NVMe."""

    def admits(self, entry: BlockStats, now: float) -> bool:
        """Whether to write it; if so its bytes are counted against the budget."""
        ...
