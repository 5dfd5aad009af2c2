"""The decoder's own counts as Prometheus metrics: one more collector on the gateway's page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from client.gateway.monitor import Monitor, queue_buckets

_COUNTERS = {
    "prefill_steps": "Steps that computed a part of a prompt",
    "prefill_tokens": "Prompt tokens computed",
    "prefill_seconds": "Time of prefill steps",
    "decode_steps": "Steps that drew tokens",
    "decode_rows": "Sequences of decode steps, summed",
    "decode_seconds": "Time of decode steps",
    "computed_tokens": "Tokens of the steps' arrays, padding and drafts included",
    "drafted_tokens": "Draft tokens",
    "accepted_tokens": "Draft tokens that the model drew as well",
    "drawn_tokens": "Tokens of answers",
    "moves": "Times a sequence's KV was copied out of or into a slot",
}
_GAUGES = {
    "slots": "Sequences that can be decoded at once",
    "running": "Sequences with a slot",
    "decoding": "Sequences whose prompt is computed",
    "waiting": "Sequences without a slot",
}


class DecoderCollector(Collector):
    """Reads what the monitor last heard; nothing while the decoder does not answer."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def collect(self) -> Iterable[Metric]:
        """Counters, gauges, the queue-time histogram, and the KV cache's tiers where there are any."""
        state = self._monitor.last
        up = GaugeMetricFamily("wicore_decoder_up", "Whether the decoder answers", value=float(state is not None))
        return [up] if state is None else [up, *_state(state), *_cache(state.get("kv_cache"))]


def _state(state: Mapping[str, Any]) -> Iterable[Metric]:
    for name, text in _GAUGES.items():
        yield GaugeMetricFamily(f"wicore_decoder_{name}", text, value=state[name])
    for name, text in _COUNTERS.items():
        yield CounterMetricFamily(f"wicore_decoder_{name}", text, value=state["totals"][name])
    buckets, total = queue_buckets(state)
    yield HistogramMetricFamily(
        "wicore_request_queue_time_seconds", "From submission to the first step", buckets=buckets, sum_value=total
    )


def _cache(cache: Mapping[str, Any] | None) -> Iterable[Metric]:
    if not cache:
        return
    used = GaugeMetricFamily("wicore_kv_cache_used_bytes", "Bytes taken on a tier", labels=["tier"])
    limit = GaugeMetricFamily("wicore_kv_cache_limit_bytes", "Bytes a tier may take", labels=["tier"])
    failures = CounterMetricFamily("wicore_kv_cache_failures", "What went wrong", labels=["tier", "reason"])
    for tier, held in cache["tiers"].items():
        used.add_metric([tier], held["used_bytes"])
        limit.add_metric([tier], held["limit_bytes"])
        for reason, count in held["failures"].items():
            failures.add_metric([tier, reason], count)
    tokens = CounterMetricFamily("wicore_kv_cache_prompt_tokens", "Prompt tokens by where from", labels=["source"])
    for source, count in cache["prompt_tokens"].items():
        tokens.add_metric([source], count)
    yield from (used, limit, failures, tokens, *_cache_traffic(cache))


def _cache_traffic(cache: Mapping[str, Any]) -> Iterable[Metric]:
    """Look-ups, moves and how fast they are, evictions, and pressure."""
    pressure = GaugeMetricFamily("wicore_kv_cache_pressure", "Held bytes over usable bytes of a tier", labels=["tier"])
    free = GaugeMetricFamily("wicore_kv_cache_largest_free_bytes", "Longest free run of a tier", labels=["tier"])
    for tier, held in cache["tiers"].items():
        pressure.add_metric([tier], held["pressure"])
        free.add_metric([tier], held["largest_free_bytes"])
    lookups = CounterMetricFamily("wicore_kv_cache_lookups", "Look-ups by why they found no more", labels=["missed"])
    for missed, count in cache["lookups"].items():
        lookups.add_metric([missed or "nothing"], count)
    moves = CounterMetricFamily("wicore_kv_cache_moves", "Entries moved", labels=["link", "reason"])
    moved = CounterMetricFamily("wicore_kv_cache_moved_bytes", "Bytes moved", labels=["link", "reason"])
    evicted = CounterMetricFamily(
        "wicore_kv_cache_evictions", "Entries that left the cache for others", labels=["tier"]
    )
    gone: dict[str, int] = dict.fromkeys(cache["tiers"], 0)
    for label, count in cache["manager"]["moves"].items():
        link, _, reason = label.partition("/")
        moves.add_metric([link, reason], count)
        moved.add_metric([link, reason], cache["manager"]["moved_bytes"][label])
        if reason in ("drop", "orphan"):
            gone[link.partition(">")[0]] += count
    for tier, count in gone.items():
        evicted.add_metric([tier], count)
    speed = GaugeMetricFamily("wicore_kv_cache_bytes_per_second", "Measured bandwidth of a link", labels=["link"])
    for link, measured in cache["mover"].get("bytes_per_s", {}).items():
        speed.add_metric([link], measured)
    yield from (pressure, free, lookups, moves, moved, evicted, speed, *_cache_faults(cache["manager"]))


def _cache_faults(manager: Mapping[str, Any]) -> Iterable[Metric]:
    """What was held and did not come back, and copies that did not arrive."""
    lost = CounterMetricFamily(
        "wicore_kv_cache_lost", "Entries that a tier did not give back", labels=["tier", "reason"]
    )
    failed = CounterMetricFamily(
        "wicore_kv_cache_failed_moves", "Copies that did not arrive", labels=["link", "reason"]
    )
    for family, counts in ((lost, manager["lost"]), (failed, manager["failed"])):
        for label, count in counts.items():
            where, _, reason = label.partition("/")
            family.add_metric([where, reason], count)
    return lost, failed
