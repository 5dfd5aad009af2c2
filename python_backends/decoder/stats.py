"""Counts and times of an engine's steps, for benchmarks and metrics."""

from __future__ import annotations

import bisect
import threading
from dataclasses import asdict, dataclass

QUEUE_BOUNDS_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the queue-time histogram's buckets, seconds; a last one has no bound."""


@dataclass
class Counts:
    """Totals since the start."""

    prefill_steps: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_steps: int = 0
    decode_rows: int = 0
    decode_seconds: float = 0.0
    computed_tokens: int = 0
    """Tokens of the steps' arrays, padding and drafts included."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Draft tokens that the model drew as well."""
    drawn_tokens: int = 0
    moves: int = 0
    """Times a sequence's KV was copied out of or into a slot."""


class Stats:
    """Thread-safe: the engine counts, anyone may read."""

    def __init__(self) -> None:
        self._counts = Counts()
        self._queued = [0] * (len(QUEUE_BOUNDS_S) + 1)
        self._queued_s = 0.0
        self._lock = threading.Lock()

    def observe(self, kind: str, useful: int, computed: int, seconds: float) -> None:
        """A step of ``useful`` scheduled tokens ran as an array of ``computed``."""
        with self._lock:
            counts = self._counts
            counts.computed_tokens += computed
            if kind == "prefill":
                counts.prefill_steps += 1
                counts.prefill_tokens += useful
                counts.prefill_seconds += seconds
            else:
                counts.decode_steps += 1
                counts.decode_rows += useful
                counts.decode_seconds += seconds

    def moved(self, count: int) -> None:
        """So many slots were copied."""
        with self._lock:
            self._counts.moves += count

    def drew(self, drawn: int, drafted: int, accepted: int) -> None:
        """A row drew so many tokens."""
        with self._lock:
            self._counts.drawn_tokens += drawn
            self._counts.drafted_tokens += drafted
            self._counts.accepted_tokens += accepted

    def waited(self, seconds: float) -> None:
        """A sequence had its first step so long after it was submitted."""
        with self._lock:
            self._queued[bisect.bisect_left(QUEUE_BOUNDS_S, seconds)] += 1
            self._queued_s += seconds

    def queue_times(self) -> dict[str, object]:
        """Histogram of `waited` as Prometheus has it: cumulative counts by upper bound (s), and their sum (s)."""
        with self._lock:
            counts, total = list(self._queued), self._queued_s
        cumulative = [sum(counts[: place + 1]) for place in range(len(counts))]
        return {"bounds_s": list(QUEUE_BOUNDS_S), "counts": cumulative, "sum_s": total}

    def read(self) -> dict[str, float]:
        """The totals, and the share of computed tokens that was padding or rejected draft."""
        with self._lock:
            values: dict[str, float] = asdict(self._counts)
        useful = values["prefill_tokens"] + values["decode_rows"] + values["accepted_tokens"]
        values["padding_share"] = 1 - useful / values["computed_tokens"] if values["computed_tokens"] else 0.0
        return values
