"""What a benchmark ran on: processor, versions, and how fast memory is read."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

PACKAGES = ("wicore", "onnxruntime", "numpy")
BANDWIDTH_BYTES = 2**30
"""Read in one round over all threads; more than the caches of any processor hold for one process."""
BANDWIDTH_ROUNDS = 5


def processor() -> str:
    """The CPU's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))


def compute_threads(configured: int) -> int:
    """Threads the decoder computes with; 0 is every physical core."""
    return configured or psutil.cpu_count(logical=False) or 1


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter here."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def peak_memory() -> int:
    """Bytes this process has held at most so far; mapped files that were read count."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak_memory() -> None:
    """Let `peak_memory` count from what this process holds now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def memory_bandwidth(threads: int, num_bytes: int = BANDWIDTH_BYTES) -> dict[str, float]:
    """Bytes a second that all threads move together, the best of a few rounds.

    ``read`` runs a reduction that does next to nothing per byte, ``copy`` counts what is read and what is written. The
    larger of the two is the best this machine was seen to do.
    """
    count = num_bytes // 8 // threads
    sources = [np.ones(count, np.int64) for _ in range(threads)]
    targets = [np.empty(count // 2, np.int64) for _ in range(threads)]

    def read(index: int) -> None:
        np.bitwise_or.reduce(sources[index])

    def copy(index: int) -> None:
        np.copyto(targets[index], sources[index][: count // 2])

    moved = count * 8 * threads
    with ThreadPoolExecutor(threads) as pool:
        return {"read": moved / _best(pool, read, threads), "copy": moved / _best(pool, copy, threads)}


def _best(pool: ThreadPoolExecutor, work: Callable[[int], None], threads: int) -> float:
    """Seconds of the fastest round; a first one makes every page resident."""
    seconds = []
    for _ in range(BANDWIDTH_ROUNDS + 1):
        begin = time.perf_counter()
        list(pool.map(work, range(threads)))
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
