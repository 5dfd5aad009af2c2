"""How much one key may ask: requests in flight, and requests in a minute. Ids and counts only; times are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from python_backends.errors import InternalError, RateLimitedError

MINUTE_S = 60.0


@dataclass
class _Share:
    """Invariants: 0 ≤ ``tokens`` ≤ the minute's limit; ``in_flight`` is the number of open `Limits.request` blocks."""

    tokens: float
    refilled_s: float
    in_flight: int = 0


class Limits:
    """A token bucket for each key, full at first: a minute's requests may come at once, and then as they refill."""

    def __init__(self) -> None:
        self._shares: dict[str, _Share] = {}

    @contextmanager
    def request(self, key: str, max_concurrent: int, per_minute: int, now: float) -> Iterator[None]:
        """A request of ``key`` is being answered; limits of 0 are none.

        Raises:
            RateLimitedError: the key has as many in flight as it may have, or has used up its minute.
        """
        share = self._shares.setdefault(key, _Share(per_minute, now))
        if max_concurrent and share.in_flight >= max_concurrent:
            raise RateLimitedError(f"this key has {share.in_flight} requests in flight, as many as it may have at once")
        if per_minute:
            self._take(share, per_minute, now)
        share.in_flight += 1
        try:
            yield
        finally:
            share.in_flight -= 1

    @staticmethod
    def _take(share: _Share, per_minute: int, now: float) -> None:
        rate = per_minute / MINUTE_S
        share.tokens = min(per_minute, share.tokens + max(0.0, now - share.refilled_s) * rate)
        share.refilled_s = max(now, share.refilled_s)
        if share.tokens < 1:
            raise RateLimitedError(f"this key may ask {per_minute} times a minute", (1 - share.tokens) / rate)
        share.tokens -= 1

    def check_integrity(self) -> None:
        """Raises InternalError where an invariant does not hold."""
        for key, share in self._shares.items():
            if share.in_flight < 0 or share.tokens < 0:
                raise InternalError(f"the share of {key} is {share}")
