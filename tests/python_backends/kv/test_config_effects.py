"""What the keys of the configuration do to kept KV: the real cache over real tiers, beneath the engine."""

import time

import numpy as np
import pytest

from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.errors import ConfigError
from python_backends.kv.blocks import EntryKey
from python_backends.kv.open import open_cache
from python_backends.kv.policies import BlockStats
from python_backends.kv.policies.leaves import LFU, LRU
from tests.checkpoints import tiny
from tests.driver import decoder
from tests.python_backends.decoder.callers import alone, prompt, word_tokenizer
from tests.python_backends.kv.caches import demote

BLOCK, CONTEXT = 16, 512
MEMORY = 2 * 2**20
"""A prompt of 200 tokens leaves some 80 KB."""


def opened(memory=MEMORY, **keys):
    runtime = decoder(tiny("1b"), num_slots=2, context=CONTEXT, block_tokens=BLOCK)
    config = Config(prefill_chunk=128, max_draft=0, quantum_tokens=0, **keys)
    cache = open_cache(runtime.kv_layout, "weights", config, memory)
    return Engine(runtime, word_tokenizer(), config, cache=cache), cache


def settled(cache):
    """The cache's figures once nothing moves any more. Bandwidths fade all the time."""
    before, deadline = None, time.monotonic() + 20
    while (now := {**cache.stats(), "mover": None}) != before and time.monotonic() < deadline:
        before = now
        time.sleep(0.4)
    return cache.stats()


def tiers_after(prompts=60, **keys):
    """Of many different prompts, more than memory holds."""
    engine, cache = opened(**keys)
    for seed in range(prompts):
        alone(engine, prompt(seed, 200), max_tokens=2)
    found = settled(cache)["tiers"]
    engine.close()
    return found


@pytest.mark.effect("hmt_gpu_threshold")
def test_above_its_threshold_the_device_tier_moves_entries_down():
    low, high = (tiers_after(5, hmt_gpu_threshold=share) for share in (0.4, 0.9))
    assert low["device"]["pressure"] <= 0.4 < high["device"]["pressure"]
    assert low["host"]["entries"] > 0 == high["host"]["entries"]


@pytest.mark.effect("hmt_cpu_threshold")
def test_above_its_threshold_the_host_tier_moves_entries_down(tmp_path):
    def after(share):
        place = {"nvme_path": str(tmp_path / str(share)), "nvme_memory_gb": 0.05}
        return tiers_after(14, hmt_gpu_threshold=0.1, hmt_cpu_threshold=share, hmt_eviction_policy="lru", **place)

    low, high = after(0.3), after(0.95)
    assert low["host"]["pressure"] <= 0.3 < high["host"]["pressure"]
    assert low["nvme"]["entries"] > 0 == high["nvme"]["entries"]


def favour_of_attention(policy):
    """How much more than others an entry that had much attention is worth, ten seconds after its use."""
    entry = BlockStats(
        EntryKey(bytes(32), "block", bytes(32), BLOCK, 1, bytes(32)), policy._reuse.open_visit(0.0), recompute_s=1.0
    )
    policy._reuse.add(entry)
    plain = policy.worth(entry, 10.0)
    entry.mass = 4.0
    return policy.worth(entry, 10.0) / plain


@pytest.mark.effect("hmt_eviction_policy", "hmt_attention_weight", "hmt_decay_factor")
def test_the_policy_is_chosen_by_name():
    def policies(**keys):
        engine, cache = opened(**keys)
        engine.close()
        return {tier: cache._manager._table.book(tier).policy for tier in ("device", "host")}

    assert isinstance(policies(hmt_eviction_policy="lru")["device"], LRU)
    assert isinstance(policies(hmt_eviction_policy="lfu")["host"], LFU)
    with pytest.raises(ConfigError, match="a2cr, lru, lfu"):
        opened(hmt_eviction_policy="fifo")
    quick, slow = (policies(hmt_attention_weight=0.5, hmt_decay_factor=factor)["device"] for factor in (0.5, 0.001))
    assert 1.0 < favour_of_attention(quick) < favour_of_attention(slow)
    assert favour_of_attention(policies(hmt_attention_weight=0.0)["device"]) == 1.0


@pytest.mark.effect("nvme_path", "nvme_memory_gb")
def test_the_tier_on_disk_is_where_and_as_large_as_it_is_said(tmp_path):
    found = tiers_after(nvme_path=str(tmp_path / "kv"), nvme_memory_gb=0.05)["nvme"]
    assert found["used_bytes"] > 0
    assert found["limit_bytes"] <= 0.05e9
    assert any(path.stat().st_size for path in (tmp_path / "kv").rglob("*"))
    assert "nvme" not in tiers_after(1, nvme_path=str(tmp_path / "other"), nvme_memory_gb=0)


@pytest.mark.effect("nvme_daily_writes_gb")
def test_no_more_is_written_in_a_day_than_may_be(tmp_path):
    """Beyond the one batch in which it is used up."""

    def written(folder, **keys):
        return tiers_after(nvme_path=str(tmp_path / folder), nvme_memory_gb=0.05, **keys)["nvme"]

    little, all_ = written("little", nvme_daily_writes_gb=1e-4), written("all")
    assert little["failures"]["budget"] > 0 == len(all_["failures"])
    assert little["written_bytes"] < 0.5 * all_["written_bytes"]


@pytest.mark.effect("nvme_free_floor_gb")
def test_a_disk_below_its_free_floor_is_not_written_to(tmp_path):
    found = tiers_after(nvme_path=str(tmp_path), nvme_memory_gb=0.05, nvme_free_floor_gb=1e9)
    assert found.get("nvme", {"written_bytes": 0})["written_bytes"] == 0


@pytest.mark.effect("kv_salt_quota_gb")
def test_a_salt_takes_no_more_than_its_quota():
    assert max(tier["used_bytes"] for tier in tiers_after(kv_salt_quota_gb=0.0003).values()) <= 0.0003e9
    assert max(tier["used_bytes"] for tier in tiers_after().values()) > 0.0003e9


@pytest.mark.effect("kv_host_precision", "kv_nvme_precision")
@pytest.mark.parametrize(("key", "way"), [("kv_host_precision", ["host"]), ("kv_nvme_precision", ["host", "nvme"])])
def test_a_tier_keeps_kv_in_its_precision(tmp_path, key, way):
    """So more fits into memory, and what comes back is rounded; by default it is what was computed."""
    room, errors = {}, {}
    for precision in ("as-is", "int8", "int4"):
        place = {"nvme_path": str(tmp_path / precision), "nvme_memory_gb": 0.05}
        engine, cache = opened(**place, **{} if precision == "as-is" else {key: precision})
        alone(engine, prompt(1, 200), max_tokens=2)
        settled(cache)
        last = max((entry.key for entry in cache._manager._table), key=lambda key: key.position)
        with cache.view(last) as payload:
            exact = np.frombuffer(payload, np.float32).copy()
        for source, target in zip(["device", *way], way, strict=False):
            demote(cache, (last,), source, target)
        back = np.empty_like(exact)
        cache._stores[way[-1]].read(last, memoryview(back).cast("B"))
        room[precision] = cache.stats()["tiers"]["host"]["usable_bytes"]
        errors[precision] = abs(back - exact).max() / np.ptp(exact)
        engine.close()
    assert errors["as-is"] == 0 < errors["int8"] < 1 / 255 < errors["int4"] < 1 / 15
    if key == "kv_host_precision":
        assert 6 * room["as-is"] < 2 * room["int8"] < 1.2 * room["int4"]


@pytest.mark.effect("prefetch_size")
def test_so_many_tokens_are_brought_up_from_the_disk(tmp_path):
    """After a restart, what is kept is on the disk alone: by LRU that is the first prompt, whatever it took."""

    def cached(folder, **keys):
        place = {"nvme_path": str(tmp_path / folder), "nvme_memory_gb": 0.05, "hmt_eviction_policy": "lru"}
        engine, cache = opened(**place)
        alone(engine, prompt(1, 300), max_tokens=2)
        for seed in range(2, 60):
            alone(engine, prompt(seed, 200), max_tokens=2)
        settled(cache)
        engine.close()
        engine, cache = opened(**place, **keys)
        found = alone(engine, prompt(1, 300), max_tokens=2).last.usage.as_json()["cached_tokens"]
        engine.close()
        return sum(found.values())

    assert cached("all") > 0
    assert cached("none", prefetch_size=0) == 0
