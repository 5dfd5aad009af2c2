"""How large the next prefill chunk may be, so that decoding sequences see their next token in time."""

from __future__ import annotations

SMOOTHING = 0.2
"""Weight of the newest measurement."""
SMALLEST_CHUNK = 16
"""Tokens; below this the weights are read for next to nothing."""


class PrefillBudget:
    """Adapts the prefill chunk to a target inter-token latency.

    Between two decode steps at most one chunk runs, so a sequence waits for one decode step and one chunk: the chunk is
    given what the target leaves beside the decode step, at the prefill speed seen so far. A single image is never
    split and may exceed it.

    Args:
        largest: tokens of a chunk where nobody decodes.
        target_s: inter-token latency aimed at, in seconds.
    """

    def __init__(self, largest: int, target_s: float) -> None:
        self._largest = largest
        self._target_s = target_s
        self._token_s: float | None = None
        self._decode_s = 0.0

    @property
    def token_s(self) -> float:
        """What a prompt token takes to compute (s), 0 while nothing was computed."""
        return self._token_s or 0.0

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """A chunk of so many tokens took so long."""
        each = seconds / tokens
        # A short chunk is mostly fixed cost: it may raise the estimate, never become it.
        known = each if self._token_s is None else self._token_s
        self._token_s = known + SMOOTHING * min(1.0, tokens / SMALLEST_CHUNK) * (each - known)

    def observe_decode(self, seconds: float) -> None:
        """A decode step took so long."""
        self._decode_s += (SMOOTHING if self._decode_s else 1.0) * (seconds - self._decode_s)

    def tokens(self, decoding: int) -> int:
        """The largest chunk now, while ``decoding`` sequences wait for their next token."""
        if not decoding or self._token_s is None:
            return self._largest if not decoding else min(self._largest, SMALLEST_CHUNK)
        room = (self._target_s - self._decode_s) / self._token_s
        return int(max(min(SMALLEST_CHUNK, self._largest), min(self._largest, room)))
