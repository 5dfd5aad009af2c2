"""Callers who hold a call to the decoder open for as long as they live, so that their requests end with them.

Behind an ensemble Triton (2.51) tells no stage that a caller has gone; of a call straight to the decoder it does. A
caller that opens such a line and names it in its requests (`contract.LINE`) is missed even where it was killed.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from python_backends.errors import InvalidParameterError, OverloadedError

log = logging.getLogger("wicore")

ASK_S = 0.1
"""How often the holder of a line is asked for: one message for all of its requests."""
MAX_LINES = 64
REMEMBER_S = 60.0
"""How long a cut line is remembered: its requests may still be on their way here."""


@dataclass(frozen=True)
class _Line:
    has_gone: Callable[[], bool]
    end: Callable[[], None]


class Lines:
    """Lines by name, from any thread.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[str, _Line] = {}
        self._cut: dict[str, float] = {}
        """By name, until when it is remembered."""
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._watch, name="wicore-lines", daemon=True)
        self._thread.start()

    def open(self, name: str, has_gone: Callable[[], bool], end: Callable[[], None]) -> None:
        """Watch a holder.

        Args:
            name: known to the holder alone, and never used again.
            has_gone: asked every `ASK_S`; an exception counts as yes.
            end: called once it has gone.

        Raises:
            InvalidParameterError: there is or was a line of that name.
            OverloadedError: `MAX_LINES` are open.
        """
        with self._changed:
            if name in self._open or name in self._cut:
                raise InvalidParameterError("there is a line of that name already; choose a random one")
            if len(self._open) >= MAX_LINES:
                raise OverloadedError(f"{MAX_LINES} lines are open already; try again later")
            self._open[name] = _Line(has_gone, end)
            self._changed.notify_all()

    def watched(self, name: str) -> Callable[[], bool] | None:
        """What tells whether a line has been cut, at no cost; None where there is no line of that name."""
        with self._changed:
            known = name in self._open or name in self._cut
        return functools.partial(self._is_cut, name) if known else None

    def close(self) -> None:
        """Stop watching."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _is_cut(self, name: str) -> bool:
        return name not in self._open

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._open or self._closing)
                if self._closing:
                    return
                lines = dict(self._open)
            for name, line in lines.items():
                if _has_gone(line):
                    self._end(name, line)
            with self._changed:
                self._changed.wait_for(lambda: self._closing, ASK_S)

    def _end(self, name: str, line: _Line) -> None:
        with self._changed:
            now = self._clock()
            self._cut = {each: until for each, until in self._cut.items() if until > now}
            self._cut[name] = now + REMEMBER_S
            del self._open[name]
        try:
            line.end()
        except Exception:
            log.exception("a line could not be ended")


def _has_gone(line: _Line) -> bool:
    try:
        return line.has_gone()
    except Exception:
        log.exception("the holder of a line could not be asked for")
        return True
