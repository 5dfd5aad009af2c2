"""Tiers whose writes fail are left alone for a while, longer each time."""

from __future__ import annotations

from python_backends.kv.blocks import Tier

FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0


class Backoff:
    """Times are seconds and never fall."""

    def __init__(self) -> None:
        self._pauses: dict[Tier, tuple[float, float]] = {}
        """After a failed write: no planned move to that tier before (time), and the next pause (seconds)."""

    def is_paused(self, tier: Tier, now: float) -> bool:
        """Whether nothing should be planned to be written there."""
        return now < self._pauses.get(tier, (0.0, 0.0))[0]

    def note(self, tier: Tier, now: float, *, ok: bool) -> None:
        """A write there ended."""
        if ok:
            self._pauses.pop(tier, None)
        else:
            pause = self._pauses.get(tier, (0.0, FIRST_BACKOFF_S))[1]
            self._pauses[tier] = (now + pause, min(2 * pause, MAX_BACKOFF_S))
