"""A prompt's KV kept, moved through the tiers and loaded again: what follows equals the cold run bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from python_backends.errors import EntryLostError
from python_backends.kv.identity import ImageSpan
from tests.driver import Driver
from tests.python_backends.kv.caches import demote, open_cache, references
from tests.python_backends.kv.kept import Kept


@pytest.fixture(scope="module")
def kept():
    return Kept()


def test_a_tail_behind_the_last_token_serves_the_same_prompt(kept):
    cache = open_cache(kept.runtime.kv_layout)
    driver = Driver(kept.runtime, [kept.prompt], kept.encoder)
    driver.append([(0, kept.length - 1)])
    driver.append([(kept.length - 1, kept.length)])
    kept.keep(cache, kept.length)
    driver.decode(2)
    hit = cache.look_up(kept.ids(cache), kept.length - 1)
    assert (hit.length, hit.missed) == (kept.length - 1, "")
    assert sum(hit.tokens_by_tier.values()) == kept.length - 1
    logits, tokens = kept.resumed(hit)
    np.testing.assert_array_equal(logits, driver.logits[0][kept.length - 1 :])
    assert tokens == driver.tokens[0]
    hit.release()


def test_other_salts_images_tokens_models_and_layouts_never_hit(kept, tmp_path):
    cache = open_cache(kept.runtime.kv_layout, tmp_path)
    at = kept.length - 1
    _, _, keys = kept.cold(cache, at, salt="mine")
    assert cache.look_up(kept.ids(cache, "mine"), at).length == at
    assert cache.look_up(kept.ids(cache, "yours"), at).length == 0
    assert cache.look_up(kept.ids(cache), at).length == 0
    swapped = [ImageSpan(a.start, a.end, b.content) for a, b in zip(kept.images, kept.images[::-1], strict=True)]
    assert cache.look_up(cache.prompt_ids(kept.prompt.ids, swapped, "mine"), at).length == 0
    other = [*kept.prompt.ids[:3], kept.prompt.ids[3] + 1, *kept.prompt.ids[4:]]
    assert cache.look_up(cache.prompt_ids(other, kept.images, "mine"), at).length == 0
    demote(cache, keys[::-1], "device", "host") if not references(cache) else None
    cache.close()
    for options in ({"fingerprint": "other weights"}, {}):
        again = open_cache(kept.runtime.kv_layout, tmp_path, **options)
        assert again.look_up(kept.ids(again, "mine"), at).length == 0
        again.close()


def test_what_is_lost_below_is_a_miss_with_its_reason_and_never_other_data(kept, tmp_path):
    cache = open_cache(kept.runtime.kv_layout, tmp_path)
    _, _, early = kept.cold(cache, 20)
    _, _, late = kept.cold(cache, 70)
    everything = tuple(dict.fromkeys((*late[::-1], *early[::-1])))
    tails = tuple(key for key in everything if key.kind == "tail")
    blocks = tuple(sorted((key for key in everything if key.kind == "block"), key=lambda key: -key.position))
    for key in (*tails, *blocks):
        demote(cache, (key,), "device", "host")
    for key in (*tails, *blocks):
        demote(cache, (key,), "host", "nvme")
    flip_a_bit(tmp_path, cache, late[-1])
    hit = cache.look_up(kept.ids(cache), kept.length - 1)
    assert hit.length == 20  # the deeper tail is gone, the earlier one is found instead
    assert not hit.loading
    hit.release()
    assert cache.stats()["tiers"]["nvme"]["failures"]["checksum"] == 1
    assert not cache._stores["nvme"].contains(late[-1])
    cache.check_integrity()
    # Kept again, it is found again.
    logits, _, _ = kept.cold(cache, 70)
    hit = cache.look_up(kept.ids(cache), kept.length - 1)
    assert hit.length == 70
    np.testing.assert_array_equal(kept.resumed(hit)[0], logits)
    hit.release()
    cache.close()


def flip_a_bit(folder, cache, key):
    """In the payload of an entry, wherever it lies on disk."""
    into = bytearray(key.num_bytes)
    cache._stores["nvme"].read(key, memoryview(into))
    for path in folder.glob("*.segment"):
        data = bytearray(path.read_bytes())
        at = data.find(into[:512])
        if at >= 0:
            data[at + 100] ^= 4
            path.write_bytes(data)
            return
    raise AssertionError("the payload is nowhere on disk")


def test_an_entry_lost_between_look_up_and_load_is_noticed(kept):
    cache = open_cache(kept.runtime.kv_layout)
    _, _, keys = kept.cold(cache, 70)
    hit = cache.look_up(kept.ids(cache), kept.length - 1)
    cache._memory["device"].drop(keys[1])
    assert not hit.load(kept.runtime, 0)
    hit.release()
    hit.release()
    assert not references(cache)


def test_an_export_that_fails_leaves_no_entry(kept):
    cache = open_cache(kept.runtime.kv_layout)
    ids = kept.ids(cache)
    key = ids.block_key(0, kept.runtime.kv_layout.block_bytes)

    def export(into):
        raise EntryLostError("gone", "missing")

    assert not cache.keep(key, export)
    assert cache.look_up(ids, 16).length == 0
    cache.check_integrity()
