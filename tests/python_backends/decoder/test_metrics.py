"""Totals of the cache as Prometheus metrics: gauges are set, counters raised by what is new."""

from __future__ import annotations

import pytest

from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.decoder.metrics import FAMILIES, MetricsReporter
from tests.checkpoints import tiny
from tests.driver import decoder
from tests.python_backends.decoder.callers import alone, prompt, word_tokenizer
from tests.python_backends.kv.caches import MB, open_cache


class Family:
    """What Triton's metric families do, as far as it can be seen: a counter refuses to fall."""

    GAUGE, COUNTER = "gauge", "counter"
    values: dict

    def __init__(self, *, name, description, kind):
        assert name in FAMILIES
        assert description
        self.name, self.kind = name, kind

    def Metric(self, *, labels):  # noqa: N802
        return Metric(self, (self.name, tuple(sorted(labels.items()))))


class Metric:
    def __init__(self, family, key):
        assert key not in family.values, "made twice"
        self.family, self.key = family, key
        family.values[key] = 0.0

    def set(self, value):
        assert self.family.kind == "gauge"
        self.family.values[self.key] = value

    def increment(self, value):
        assert value >= 0
        assert self.family.kind == "counter"
        self.family.values[self.key] += value


def total(values, name, **labels):
    return sum(value for (found, has), value in values.items() if found == name and set(labels.items()) <= set(has))


def test_metrics_follow_the_cache(tmp_path):
    runtime = decoder(tiny("1b"), num_slots=2, context=256, block_tokens=16)
    cache = open_cache(runtime.kv_layout, tmp_path, device=MB // 8, host=MB // 8, nvme=8 * MB)
    engine = Engine(runtime, word_tokenizer(), Config(prefill_chunk=32), cache=cache)
    family = type("Own", (Family,), {"values": {}})
    reporter = MetricsReporter(family, cache.stats)
    for seed in (1, 1, 2, 3, 4, 1):
        alone(engine, prompt(seed, 80))
        reporter.update()
    values = family.values
    found = total(values, "wicore_kv_prompt_tokens_total")
    assert found == 6 * 80
    assert 79 <= total(values, "wicore_kv_prompt_tokens_total", source="device") < found
    assert total(values, "wicore_kv_lookups_total") == 6
    assert total(values, "wicore_kv_lookups_total", missed="new") == 4
    assert total(values, "wicore_kv_bytes", tier="device") == cache.stats()["tiers"]["device"]["live_bytes"] > 0
    assert total(values, "wicore_kv_moves_total") > 0
    assert total(values, "wicore_kv_moved_bytes_total") > total(values, "wicore_kv_moves_total")
    reporter.close()
    engine.close()


def test_a_reader_that_fails_ends_the_reports_alone():
    def read():
        raise RuntimeError("gone")

    reporter = MetricsReporter(type("Own", (Family,), {"values": {}}), read)
    reporter.close()
    with pytest.raises(RuntimeError):
        reporter.update()
