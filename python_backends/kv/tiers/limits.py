"""What keeps a disk from being worn or waited for: a write budget, and a pause after repeated failures."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

Clock = Callable[[], float]
DAY_S = 86_400.0


class WriteBudget:
    """A bucket that holds one day's bytes and fills evenly.

    Within a process only the monotonic clock counts. Over a restart the level is kept in a file, and the wall clock
    may add what flowed in since: never less than nothing and never more than a day's worth, whatever it jumps to.

    Args:
        bytes_per_day: None: no limit.
        path: where the level is kept.
    """

    def __init__(
        self, bytes_per_day: int | None, path: Path, clock: Clock = time.monotonic, wall: Clock = time.time
    ) -> None:
        self.bytes_per_day = bytes_per_day
        self._path = path
        self._clock, self._wall = clock, wall
        self._lock = threading.Lock()
        self._at = clock()
        self._level = self._saved_level()
        self._saved = self._level

    def _saved_level(self) -> float:
        whole = float(self.bytes_per_day or 0)
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            level, at = float(saved["level"]), float(saved["at"])
        except (OSError, ValueError, KeyError, TypeError):
            return whole
        since = min(max(self._wall() - at, 0.0), DAY_S)
        return min(level + since * whole / DAY_S, whole)

    @property
    def left_bytes(self) -> int:
        """What may be written now; negative where collection had to write more."""
        with self._lock:
            return self._refilled()

    def spend(self, num_bytes: int, *, force: bool = False) -> bool:
        """Count a write; False, and nothing counted, where the budget does not allow it."""
        if self.bytes_per_day is None:
            return True
        with self._lock:
            if num_bytes > self._refilled() and not force:
                return False
            self._level -= num_bytes
            if abs(self._level - self._saved) > self.bytes_per_day / 100:
                self._save()
            return True

    def save(self) -> None:
        """Keep the level for the next start."""
        with self._lock:
            if self.bytes_per_day is not None:
                self._refilled()
                self._save()

    def _refilled(self) -> int:
        now = self._clock()
        whole = self.bytes_per_day or 0
        self._level = min(self._level + max(0.0, now - self._at) * whole / DAY_S, whole)
        self._at = now
        return int(self._level)

    def _save(self) -> None:
        self._saved = self._level
        unfinished = self._path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a full disk loses the count of a day's hundredth
            fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                json.dump({"level": self._level, "at": self._wall()}, file)
            os.replace(unfinished, self._path)


class Breaker:
    """Leaves a medium alone for a while after ``threshold`` failures in a row; each further one doubles the pause.

    Args:
        pause_s: the first pause.
        longest_s: no pause is longer.
    """

    def __init__(
        self, threshold: int = 5, pause_s: float = 15.0, longest_s: float = 600.0, clock: Clock = time.monotonic
    ) -> None:
        self._threshold, self._first_s, self._longest_s = threshold, pause_s, longest_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_s = pause_s
        self._until = float("-inf")
        self.pauses = 0

    @property
    def paused_s(self) -> float:
        """Seconds until the medium is tried again; 0 where it is in use."""
        with self._lock:
            return max(0.0, self._until - self._clock())

    def succeed(self) -> None:
        """The medium did what was asked."""
        with self._lock:
            self._failures, self._pause_s = 0, self._first_s

    def fail(self) -> None:
        """It did not."""
        with self._lock:
            self._failures += 1
            if self._failures >= self._threshold and self._clock() >= self._until:
                self._until = self._clock() + self._pause_s
                self._pause_s = min(2 * self._pause_s, self._longest_s)
                # One more failure after the pause is enough for the next.
                self._failures = self._threshold - 1
                self.pauses += 1
