"""Waits for copies of KV that a runtime makes beside its steps."""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from python_backends.runtime.base import Transfer

log = logging.getLogger("wicore")


class Fills:
    """One thread, begun with the first transfer, that waits for one after another. Thread-safe."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="wicore-fill")
        self._begun: set[Future[None]] = set()

    def begin(self, transfer: Transfer, end: Callable[[Exception | None], None]) -> None:
        """Have ``end`` called, from the thread, when a transfer is over: with None, or with what went wrong."""
        future = self._thread.submit(_wait, transfer, end)
        self._begun.add(future)
        future.add_done_callback(self._begun.discard)

    def wait(self) -> None:
        """Until everything that has begun by now has ended; not from the thread."""
        if self._begun:
            concurrent.futures.wait(tuple(self._begun))

    def close(self) -> None:
        """End the thread, after everything that has begun."""
        self._thread.shutdown()


def _wait(transfer: Transfer, end: Callable[[Exception | None], None]) -> None:
    error: Exception | None = None
    try:
        transfer.wait()
    except Exception as failure:
        log.exception("KV could not be copied")
        error = failure
    try:
        end(error)
    except Exception:
        log.exception("a copy of KV ended in a fault")
