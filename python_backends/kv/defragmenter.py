"""Keeps room in one piece in the tiers in memory, ahead of need and beside everything else."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from python_backends.kv.tiers.base import MemoryStore

log = logging.getLogger("wicore")

INTERVAL_S = 1.0
MOST_BYTES = 256 * 2**20
"""Moved in one go in one tier: a tenth of a second."""


class Defragmenter:
    """Moves entries together on a thread of its own, so that an insertion seldom has to.

    Args:
        stores: whose room.
        run_bytes: what is to be free in one piece, wherever as much is free at all: the largest entry.
        interval_s: between two looks.
    """

    def __init__(self, stores: Sequence[MemoryStore], run_bytes: int, interval_s: float = INTERVAL_S) -> None:
        self._stores = stores
        self._run_bytes = run_bytes
        self._interval_s = interval_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="kv-defragment", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._closed.wait(self._interval_s):
            try:
                for store in self._stores:
                    store.defragment(self._run_bytes, MOST_BYTES)
            except Exception:
                log.exception("a tier could not be defragmented; insertions do it when they must")
                return
