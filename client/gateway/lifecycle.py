"""From serving to draining: requests in flight are counted, and after SIGTERM no new one is taken."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Lifecycle:
    """Used within one event loop.

    Invariant: `in_flight` is the number of `request` blocks that are open; once `draining`, it only falls.
    """

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request is being answered. Not to be opened while draining."""
        assert not self.draining, "a request was taken while draining"
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Take no new request and wait for those in flight; False where some are left at the end."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
