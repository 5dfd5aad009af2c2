"""A prompt's KV kept, moved through the tiers and loaded again: what follows equals the cold run bit for bit."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from python_backends.errors import EntryLostError
from python_backends.kv.identity import ImageSpan, content_hash
from tests.checkpoints import FAMILIES, tiny
from tests.driver import Driver, decoder, vision
from tests.prompts import prompt
from tests.python_backends.kv.caches import demote, open_cache, references

BLOCK, CONTEXT = 16, 256
SOURCES = ("device", "host", "nvme", "restart")


class Kept:
    """A prompt with two images, longer than three windows, computed in two chunks, and what the cache took of it."""

    def __init__(self, family="4b"):
        self.runtime = decoder(tiny(family), num_slots=3, context=CONTEXT, block_tokens=BLOCK)
        self.encoder = vision(tiny(family))
        self.prompt = prompt(tiny(family), np.random.default_rng(2), text=90, pictures=2)
        self.length = len(self.prompt.ids)
        assert self.length > 3 * FAMILIES[family].text["sliding_window"]
        self.images = [
            ImageSpan(start, end, content_hash(pixels.tobytes()))
            for (start, end), pixels in zip(self.prompt.spans, self.prompt.pixels, strict=True)
        ]

    def boundaries(self):
        inside = {at for start, end in self.prompt.spans for at in range(start + 1, end)}
        return [at for at in range(1, self.length) if at not in inside]

    def ids(self, cache, salt=""):
        return cache.prompt_ids(self.prompt.ids, self.images, salt)

    def cold(self, cache, at, salt=""):
        """Logits from ``at`` on of a run cut there, and the entries kept on the way."""
        driver = Driver(self.runtime, [self.prompt], self.encoder)
        driver.append([(0, at)])
        keys = self.keep(cache, at, salt)
        driver.append([(at, self.length)])
        driver.decode(2)
        return driver.logits[0][at:], driver.tokens[0], keys

    def keep(self, cache, at, salt=""):
        ids, layout = self.ids(cache, salt), self.runtime.kv_layout
        for index in range(at // BLOCK):
            export = functools.partial(self.runtime.export_block, 0, index * BLOCK)
            assert cache.keep(ids.block_key(index, layout.block_bytes), export)
        export = functools.partial(self.runtime.export_tail, 0, at)
        assert cache.keep(ids.tail_key(at, layout.tail_bytes(at)), export)
        return (
            *[ids.block_key(i, layout.block_bytes) for i in range(at // BLOCK)],
            ids.tail_key(at, layout.tail_bytes(at)),
        )

    def spoil(self):
        for buffer in self.runtime._slots.buffers.values():
            buffer[...] = 5.0

    def resumed(self, hit, slot=0):
        """Logits and tokens after the hit's tokens were loaded into a slot that others have used."""
        self.spoil()
        assert hit.load(self.runtime, slot)
        driver = Driver(self.runtime, [self.prompt], self.encoder)
        driver.done[0] = hit.length
        driver.append([(hit.length, self.length)])
        driver.decode(2)
        return driver.logits[0], driver.tokens[0]


@pytest.fixture(scope="module")
def kept():
    return Kept()


@pytest.mark.parametrize("source", SOURCES)
def test_from_every_tier_at_every_boundary_a_request_continues_bit_for_bit(kept, source, tmp_path):
    cache = open_cache(kept.runtime.kv_layout, tmp_path)
    step = 1 if source in ("device", "nvme") else 5
    for number, at in enumerate(kept.boundaries()[::step]):
        salt = str(number)  # every boundary alone
        logits, tokens, keys = kept.cold(cache, at, salt)
        if source != "device":
            demote(cache, keys[::-1], "device", "host")
        if source in ("nvme", "restart"):
            demote(cache, keys[::-1], "host", "nvme")
        if source == "restart":
            cache.close()
            cache = open_cache(kept.runtime.kv_layout, tmp_path)
        hit = cache.look_up(kept.ids(cache, salt), kept.length - 1)
        assert hit.length == at
        tier = "nvme" if source == "restart" else source
        assert hit.tokens_by_tier == {"device": 0, "host": 0, "nvme": 0} | {tier: at}
        assert hit.missed == ("" if at == kept.length - 1 else hit.missed)
        found, found_tokens = kept.resumed(hit)
        np.testing.assert_array_equal(found, logits)
        assert found_tokens == tokens
        hit.release()
        assert not references(cache)
        cache.check_integrity()
        with cache.lock:
            for move in cache._manager.erase(keys, 0.0):
                cache._carrier.finish(move, None)
    cache.close()


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
