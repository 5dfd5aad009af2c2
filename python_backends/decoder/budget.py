"""How large the next prefill chunk may be, so that decoding sequences see their next token in time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SMOOTHING = 0.2
"""Weight of the newest measurement."""
SMALLEST_CHUNK = 8
"""Tokens; below this the weights are read for next to nothing."""
CERTAINTY = 6.0
"""Mean deviations that are kept free beneath the target. Steps have longer tails than normal times: with 4, more than
the 99th percentile of those, 3 % of the intervals beside a long prompt were beyond the target."""
FIRST_DEVIATION = 0.05
"""Of times that were measured once, as a share."""
LARGEST_DEVIATION = 0.5
"""A single measurement counts as no further off upwards, as a share: the machine may have been away."""


def _sane(seconds: float, expected: float) -> float:
    return min(seconds, expected * (1 + LARGEST_DEVIATION))


@dataclass
class _Deviation:
    """How far times are from what was expected, as a share of it; exponentially weighted mean."""

    share: float = FIRST_DEVIATION

    def observe(self, seconds: float, expected: float) -> None:
        self.share += SMOOTHING * (abs(seconds - expected) / max(expected, 1e-9) - self.share)

    @property
    def margin(self) -> float:
        """What nearly no time exceeds, as a multiple of the expected one."""
        return 1 + CERTAINTY * self.share


@dataclass
class _Size:
    """Chunks of about one size."""

    tokens: float
    seconds: float


class PrefillBudget:
    """Adapts the prefill chunk to a target inter-token latency.

    Between two decode steps at most one chunk runs, so a sequence waits for one decode step, one chunk, and what the
    engine does before each: the chunk is given what the target leaves beside the others. What a chunk takes is known
    from those that were run, by size and with straight lines between sizes: a small one is mostly fixed cost (the
    weights are read once), so the speed of large ones says little about it. The target is a bound, not a mean: as much
    is kept free as times vary.
    A single image is never split and may exceed it.

    Args:
        largest: tokens of a chunk where nobody decodes.
        target_s: inter-token latency not to be exceeded, in seconds.
    """

    def __init__(self, largest: int, target_s: float) -> None:
        self._largest = largest
        self._smallest = min(SMALLEST_CHUNK, largest)
        self._target_s = target_s
        self._sizes: dict[int, _Size] = {}
        """By bits of the number of tokens."""
        self._decode_s: float | None = None
        self._ended_s: float | None = None
        self._between_s = 0.0
        self._chunks, self._decodes, self._betweens = _Deviation(), _Deviation(), _Deviation()

    @property
    def token_s(self) -> float:
        """What a token of a large chunk takes to compute (s), 0 while nothing was computed."""
        if not self._sizes:
            return 0.0
        size = self._sizes[max(self._sizes)]
        return size.seconds / size.tokens

    @property
    def decode_s(self) -> float:
        """What a decode step takes (s), 0 while there was none."""
        return self._decode_s or 0.0

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """A chunk of so many tokens took so long."""
        if self._sizes:
            expected = self._chunk_seconds(tokens)
            seconds = _sane(seconds, expected)
            self._chunks.observe(seconds, expected)
        size = self._sizes.setdefault(tokens.bit_length(), _Size(tokens, seconds))
        size.tokens += SMOOTHING * (tokens - size.tokens)
        size.seconds += SMOOTHING * (seconds - size.seconds)

    def observe_decode(self, seconds: float) -> None:
        """A decode step took so long."""
        if self._decode_s is None:
            self._decode_s = seconds
            return
        seconds = _sane(seconds, self._decode_s)
        self._decodes.observe(seconds, self._decode_s)
        self._decode_s += SMOOTHING * (seconds - self._decode_s)

    def begin_step(self, now_s: float) -> None:
        """A step begins to run. What the engine did since the last one ended counts, unless it had nothing to do."""
        if self._ended_s is not None:
            self._observe_between(now_s - self._ended_s)

    def end_step(self, now_s: float) -> None:
        """A step has run."""
        self._ended_s = now_s

    def pause(self) -> None:
        """There is nothing to run."""
        self._ended_s = None

    def _observe_between(self, seconds: float) -> None:
        if not self._between_s:
            self._between_s = seconds
            return
        seconds = _sane(seconds, self._between_s)
        self._betweens.observe(seconds, self._between_s)
        self._between_s += SMOOTHING * (seconds - self._between_s)

    def tokens(self, decoding: int) -> int:
        """The largest chunk now, while ``decoding`` sequences wait for their next token."""
        if not decoding:
            return self._largest
        if not self._sizes:
            return self._smallest
        others = self.decode_s * self._decodes.margin + 2 * self._between_s * self._betweens.margin
        room = (self._target_s - others) / self._chunks.margin
        low, high = self._smallest, self._largest
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._chunk_seconds(middle) <= room else (low, middle - 1)
        return low

    def _chunk_seconds(self, tokens: int) -> float:
        """What a chunk is expected to take; never less than a shorter one."""
        before = (0.0, 0.0)
        for point in self._points():
            if tokens <= point[0]:
                return before[1] + (point[1] - before[1]) * (tokens - before[0]) / max(point[0] - before[0], 1e-9)
            before = point
        return before[1] * tokens / before[0]

    def _points(self) -> Iterator[tuple[float, float]]:
        """(tokens, seconds) of what was measured, rising. Where small chunks were not, they are as slow as a step."""
        sizes = [self._sizes[key] for key in sorted(self._sizes)]
        if sizes[0].tokens > 1:
            yield 1.0, min(self.decode_s, sizes[0].seconds)
        longest = 0.0
        for size in sizes:
            longest = max(longest, size.seconds)
            yield size.tokens, longest
