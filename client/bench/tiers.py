"""How fast the KV cache's tiers take and give back payloads, beside plain transfers of the same disk and run."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.bench.machine import cores, processor, versions
from client.bench.report import columns
from python_backends.errors import WiCoreError
from python_backends.kv.blocks import EntryKey
from python_backends.kv.tiers.arena import Arena
from python_backends.kv.tiers.checksum import ALGORITHMS, FASTEST
from python_backends.kv.tiers.files import SegmentFile, probe_direct_io
from python_backends.kv.tiers.nvme import NvmeStore
from python_backends.kv.tiers.records import pages
from python_backends.runtime.memory import lazy_zeros

BATCH_BYTES = 16 * 2**20
"""What the mover brings together."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    total_bytes: int = 2**30
    """Written and read in every round; the disk needs twice as much."""
    block_bytes: int = 2**19
    """Payload of a block: 64 tokens of the 1B shape's four global layers in float32."""
    tail_bytes: int = 22 * 2**20
    """Payload of a tail: 512 tokens of its 22 local layers in float32."""
    rounds: int = 3


Turn = Callable[[], float]
"""One timed transfer of everything; returns its seconds."""


def measure(folder: Path, plan: Plan) -> dict[str, Any]:
    """Bytes a second: medians over rounds in which raw transfers and the tier take turns.

    Raises InternalError and TierError as the stores do.
    """
    with tempfile.TemporaryDirectory(prefix="wicore-bench-", dir=folder) as scratch:
        path = Path(scratch)
        direct = probe_direct_io(path)
        runs = [
            _measure_shape(path, plan, name, pages(size), direct)  # plain direct I/O moves whole pages only
            for name, size in (("blocks", plan.block_bytes), ("tails", plan.tail_bytes))
        ]
    return {
        "configuration": {
            "plan": asdict(plan),
            "direct_io": direct,
            "checksum": ALGORITHMS[FASTEST].__name__.strip("_"),
            "checksum_bytes_per_s": _checksum_speed(plan.tail_bytes),
            "processor": processor(),
            "cores": cores(),
            "versions": versions(),
        },
        "runs": runs,
    }


def _measure_shape(folder: Path, plan: Plan, name: str, size: int, direct: bool) -> dict[str, Any]:
    count = max(2, plan.total_bytes // size)
    piece = lazy_zeros((max(size, BATCH_BYTES // size * size),), np.uint8)
    piece[:] = np.random.default_rng(0).integers(0, 256, piece.size, dtype=np.uint8)
    seconds: dict[str, list[float]] = {}
    for _ in range(plan.rounds):
        for label, took in (*_raw(folder, piece, size, count, direct), *_tier(folder, piece, size, count)):
            seconds.setdefault(label, []).append(took)
    speed = {label: count * size / statistics.median(values) for label, values in seconds.items() if label != "start"}
    return {
        "entries": name,
        "entry_bytes": size,
        "count": count,
        "bytes_per_s": speed,
        "start_s": statistics.median(seconds["start"]),
        "of_raw": {
            "write": speed["tier write"] / speed["raw write"],
            "read": speed["tier read"] / speed["raw read"],
            "read one by one": speed["tier read one by one"] / speed["raw read one by one"],
        },
    }


def _raw(folder: Path, piece: NDArray[np.uint8], size: int, count: int, direct: bool) -> Iterator[tuple[str, float]]:
    """Plain transfers of a file of its own, preallocated as the tier's are."""
    path = folder / "raw"
    file = SegmentFile(path, direct=direct, create=True)
    try:
        began = time.perf_counter()
        file.allocate(count * size)
        for at, part in _pieces(piece, size, count, len(piece)):
            file.write(at, [part])
        yield "raw write", time.perf_counter() - began
        for label, length in (("raw read", len(piece)), ("raw read one by one", size)):
            began = time.perf_counter()
            for at, part in _pieces(piece, size, count, length):
                file.read(at, [part])
            yield label, time.perf_counter() - began
    finally:
        file.close()
        path.unlink()


def _pieces(piece: NDArray[np.uint8], size: int, count: int, length: int) -> Iterator[tuple[int, memoryview]]:
    for at in range(0, count * size, length):
        yield at, piece.data[: min(length, count * size - at)]


def _tier(folder: Path, piece: NDArray[np.uint8], size: int, count: int) -> Iterator[tuple[str, float]]:
    """The NVMe tier, in batches as the mover brings them; then what a restart and single reads take."""
    keys = [
        EntryKey(number.to_bytes(32, "little"), "block", bytes(32), number, size, bytes(32)) for number in range(count)
    ]
    options: dict[str, Any] = {"fingerprint": bytes(32), "block_bytes": size, "largest_bytes": size}
    place = folder / "tier"
    # Twice the room, so that nothing is collected: that is another measurement.
    store = NvmeStore(place, 2 * count * size + 2**30, **options)
    views = [piece.data[at : at + size] for at in range(0, len(piece) - size + 1, size)]
    try:
        began = time.perf_counter()
        for batch in _batches(keys, len(views)):
            _check(store.write_many(list(zip(batch, views, strict=False))))
        yield "tier write", time.perf_counter() - began
        store.close()
        began = time.perf_counter()
        store = NvmeStore(place, 2 * count * size + 2**30, **options)
        yield "start", time.perf_counter() - began
        for label, length in (("tier read", len(views)), ("tier read one by one", 1)):
            began = time.perf_counter()
            for batch in _batches(keys, length):
                _check(store.read_many(list(zip(batch, views, strict=False))))
            yield label, time.perf_counter() - began
        for key in keys:
            store.drop(key)
        yield from _memory(keys, views, size)
    finally:
        store.close()
        for path in place.iterdir():
            path.unlink()
        place.rmdir()


def _memory(keys: Sequence[EntryKey], views: Sequence[memoryview], size: int) -> Iterator[tuple[str, float]]:
    """The arena, whose pages were touched before."""
    arena = Arena("host", len(views) * size)
    for label in ("", "arena write"):
        began = time.perf_counter()
        for batch in _batches(keys, len(views)):
            _check(arena.write_many(list(zip(batch, views, strict=False))))
            for key in batch:
                arena.drop(key)
        if label:
            yield label, time.perf_counter() - began
    arena.close()


def _batches(keys: Sequence[EntryKey], length: int) -> Iterator[Sequence[EntryKey]]:
    for first in range(0, len(keys), length):
        yield keys[first : first + length]


def _check(results: Sequence[WiCoreError | None]) -> None:
    for error in results:
        if error is not None:
            raise error


def _checksum_speed(num_bytes: int) -> float:
    content = np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        ALGORITHMS[FASTEST](content.data)
        best = min(best, time.perf_counter() - began)
    return num_bytes / best


def tiers_text(found: Mapping[str, Any]) -> str:
    """What `wicore bench tiers` prints."""
    about = found["configuration"]
    heads = ["", "entry MiB", "raw GB/s", "tier GB/s", "of raw"]
    rows = []
    for run in found["runs"]:
        for way, share in run["of_raw"].items():
            speed = run["bytes_per_s"]
            raw, tier = speed[f"raw {way}"] / 1e9, speed[f"tier {way}"] / 1e9
            rows.append(
                [f"{run['entries']}: {way}", run["entry_bytes"] / 2**20, f"{raw:.2f}", f"{tier:.2f}", f"{share:.0%}"]
            )
    starts = ", ".join(f"{run['count']} {run['entries']} {1e3 * run['start_s']:.0f} ms" for run in found["runs"])
    memory = ", ".join(f"{run['entries']} {run['bytes_per_s']['arena write'] / 1e9:.1f}" for run in found["runs"])
    return "\n".join(
        [
            f"direct I/O: {'yes' if about['direct_io'] else 'no'}; checksum: {about['checksum']}, "
            f"{about['checksum_bytes_per_s'] / 1e9:.1f} GB/s",
            columns(heads, rows),
            f"start with: {starts}",
            f"arena, GB/s written: {memory}",
        ]
    )
