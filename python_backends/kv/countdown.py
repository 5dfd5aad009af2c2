"""Something to be done once when several others are."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Countdown:
    """Calls ``done`` when so many others are."""

    def __init__(self, count: int, done: Callable[[], None]) -> None:
        self._count = count
        self._done = done
        self.lock = threading.Lock()
        if not count:
            done()

    def tick(self) -> None:
        """Another one is done."""
        with self.lock:
            self._count -= 1
            last = not self._count
        if last:
            self._done()
