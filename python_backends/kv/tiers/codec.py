"""What a tier stores in place of a payload: the seam for a lower precision on slower tiers.

A codec's name goes into the fingerprint of its segments, so that nothing is ever read with another one.
"""

from __future__ import annotations

from typing import Protocol


class Codec(Protocol):
    """Turns payloads into what is stored and back."""

    @property
    def name(self) -> str:
        """Changes whenever what is stored would."""
        ...

    def stored_bytes(self, num_bytes: int) -> int:
        """Size of what is stored for a payload of ``num_bytes``."""
        ...

    def encode(self, payload: memoryview, into: memoryview) -> None:
        """Fill ``into`` (``stored_bytes``)."""
        ...

    def decode(self, stored: memoryview, into: memoryview) -> None:
        """Fill ``into`` (``num_bytes``)."""
        ...
