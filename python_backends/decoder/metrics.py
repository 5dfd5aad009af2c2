"""The KV cache's counts as Prometheus metrics, through Triton's own metrics port.

Triton (2.51) gives a Python model metric families; a counter of theirs can only be raised, so the totals that the cache
keeps are turned into differences here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("wicore")

INTERVAL_S = 5.0
GAUGE, COUNTER = "gauge", "counter"

FAMILIES: dict[str, tuple[str, str]] = {
    "wicore_kv_bytes": (GAUGE, "Payload bytes held, by tier"),
    "wicore_kv_limit_bytes": (GAUGE, "Payload bytes that fit, by tier"),
    "wicore_kv_entries": (GAUGE, "Blocks and tails held, by tier"),
    "wicore_kv_largest_free_bytes": (GAUGE, "Longest free run, by tier"),
    "wicore_kv_bandwidth_bytes_per_second": (GAUGE, "Measured bandwidth, by link"),
    "wicore_kv_prompt_tokens_total": (COUNTER, "Prompt tokens by where their KV came from"),
    "wicore_kv_lookups_total": (COUNTER, "Look-ups by why they found no more"),
    "wicore_kv_moves_total": (COUNTER, "Moves between tiers, evictions among them, by link and reason"),
    "wicore_kv_moved_bytes_total": (COUNTER, "Bytes of those moves"),
    "wicore_kv_lost_total": (
        COUNTER,
        "Entries that a tier did not give back, late ones among them, by tier and reason",
    ),
    "wicore_kv_failed_moves_total": (COUNTER, "Copies between tiers that did not arrive, by link and reason"),
    "wicore_kv_failures_total": (COUNTER, "Failed reads and writes, bad checksums among them, by tier and reason"),
}


@dataclass(frozen=True)
class Sample:
    """One value of a family."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


def samples(stats: Mapping[str, Any]) -> Iterator[Sample]:
    """Of what `KvCache.stats` gives."""
    for tier, found in stats["tiers"].items():
        labels = (("tier", tier),)
        yield Sample("wicore_kv_bytes", labels, found["live_bytes"])
        yield Sample("wicore_kv_limit_bytes", labels, found["usable_bytes"])
        yield Sample("wicore_kv_entries", labels, found["entries"])
        yield Sample("wicore_kv_largest_free_bytes", labels, found["largest_free_bytes"])
        for reason, count in found["failures"].items():
            yield Sample("wicore_kv_failures_total", (*labels, ("reason", reason)), count)
    for source, count in stats["prompt_tokens"].items():
        yield Sample("wicore_kv_prompt_tokens_total", (("source", source),), count)
    for missed, count in stats["lookups"].items():
        yield Sample("wicore_kv_lookups_total", (("missed", missed or "nothing"),), count)
    for name in ("moves", "moved_bytes"):
        for label, count in stats["manager"][name].items():
            link, _, reason = label.partition("/")
            yield Sample(f"wicore_kv_{name}_total", (("link", link), ("reason", reason)), count)
    for name, family, scope in (
        ("lost", "wicore_kv_lost_total", "tier"),
        ("failed", "wicore_kv_failed_moves_total", "link"),
    ):
        for label, count in stats["manager"][name].items():
            where, _, reason = label.partition("/")
            yield Sample(family, ((scope, where), ("reason", reason)), count)
    for link, speed in stats["mover"].get("bytes_per_s", {}).items():
        yield Sample("wicore_kv_bandwidth_bytes_per_second", (("link", link),), speed)


class MetricsReporter:
    """Writes the metrics every few seconds, on a thread of its own.

    Args:
        family: Triton's ``MetricFamily``.
        read: gives `KvCache.stats`.
    """

    def __init__(self, family: Any, read: Callable[[], Mapping[str, Any]]) -> None:
        self._read = read
        self._families = {
            name: (kind, family(name=name, description=text, kind=getattr(family, kind.upper())))
            for name, (kind, text) in FAMILIES.items()
        }
        self._known: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[Any, float]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="wicore-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, and let go of the metrics."""
        self._closed.set()
        self._thread.join()
        self._known.clear()
        self._families.clear()

    def update(self) -> None:
        """Write what the cache says now."""
        for sample in samples(self._read()):
            kind, family = self._families[sample.name]
            known = self._known.get((sample.name, sample.labels))
            metric, before = known or (family.Metric(labels=dict(sample.labels)), 0.0)
            if kind == GAUGE:
                metric.set(float(sample.value))
            elif sample.value > before:
                metric.increment(float(sample.value - before))
            self._known[sample.name, sample.labels] = metric, sample.value

    def _loop(self) -> None:
        while True:
            try:
                self.update()
            except Exception:
                log.exception("metrics could not be written")
                return
            if self._closed.wait(INTERVAL_S):
                return
