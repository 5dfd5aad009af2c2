"""The engine with a KV cache and requests about pictures: encoded where their KV is not held, and then alone."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

from python_backends.errors import InternalError
from python_backends.kv.identity import content_hash
from python_backends.kv.mover import Mover
from tests.checkpoints import IMAGE, tiny
from tests.driver import vision
from tests.prompts import prompt as random_prompt
from tests.python_backends.decoder.cached_engines import cached, engines, keys_of, missed, send_down
from tests.python_backends.decoder.callers import Caller, prompt


@pytest.fixture
def open_engine(tmp_path):
    with engines(tmp_path) as open_:
        yield open_


class Pictured:
    """Requests about pictures, whose embeddings are asked for as the backend does."""

    def __init__(self, engine, encoder):
        self.engine, self.encoder = engine, encoder
        self.encoded = 0

    def ask(self, item, fail=False, **parameters):
        caller = Caller(item.ids, **parameters)
        starts = [start for start, _ in item.spans]
        hashes = [content_hash(image.tobytes()) for image in item.pixels]
        request = dataclasses.replace(caller.request, image_starts=starts, image_hashes=hashes)
        hit = self.engine.look_up(request)
        known = 0 if hit is None else sum(start < hit.length for start in starts)

        def rest():
            if fail:
                raise InternalError("the encoder is gone")
            return self.encode(item.pixels[:known])

        features = self.encode(item.pixels[known:])
        caller.request = dataclasses.replace(
            request, hit=hit, image_features=features, encoded_from=known, encode_rest=rest
        )
        return caller

    def encode(self, pixels):
        self.encoded += len(pixels)
        return np.concatenate(self.encoder.encode(pixels)) if len(pixels) else None


def test_a_picture_that_was_seen_is_not_encoded_again(open_engine):
    folder = tiny("4b")
    plain, _ = open_engine("4b", cached=False)
    engine, _ = open_engine("4b")
    encoder = vision(folder)
    item = random_prompt(folder, np.random.default_rng(3), text=60, pictures=2)
    asking, reference = Pictured(engine, encoder), Pictured(plain, encoder)
    end = item.spans[-1][1]
    for question in range(3):
        asked = dataclasses.replace(item, ids=[*item.ids[:end], *prompt(70 + question, 20)])
        found = asking.ask(asked).to(engine).wait()
        assert found.tokens == reference.ask(asked).to(plain).wait().tokens
        assert cached(found) == (end if question else 0)
    assert (asking.encoded, reference.encoded) == (2, 6)
    other = dataclasses.replace(item, pixels=item.pixels[::-1].copy())
    assert cached(asking.ask(other).to(engine).wait()) < item.spans[0][0]
    assert asking.encoded == 4


@pytest.mark.parametrize("fail", [False, True])
def test_a_picture_whose_kv_is_lost_after_all_is_encoded_then(open_engine, fail):
    folder = tiny("4b")
    engine, cache = open_engine("4b", slots=1)
    item = random_prompt(folder, np.random.default_rng(3), text=60, pictures=2)
    asking = Pictured(engine, vision(folder))
    first = asking.ask(item).to(engine).wait()
    caller = asking.ask(item, fail=fail)
    for key in keys_of(cache):
        cache._memory["device"].drop(key)
    caller.to(engine).wait()
    if fail:
        assert caller.last.error.message == "the encoder is gone"
        return
    assert caller.tokens == first.tokens
    assert (asking.encoded, missed(caller)) == (4, "lost")


def test_a_picture_behind_what_is_left_of_a_hit_is_encoded_then(open_engine):
    """Look-up counts on both pictures; then the second one's tail turns out to be lost, and the first one's is not."""
    folder = tiny("4b")
    engine, cache = open_engine("4b", folder="tier", mover=Mover)
    item = random_prompt(folder, np.random.default_rng(3), text=60, pictures=2)
    asking = Pictured(engine, vision(folder))
    first = asking.ask(item).to(engine).wait()
    send_down(engine, cache, "host", "nvme")
    store, begin = cache._stores["nvme"], threading.Event()
    read_many = store.read_many

    def read_later(items):
        assert begin.wait(10)
        return read_many(items)

    store.read_many = read_later
    caller = asking.ask(item)
    assert asking.encoded == 2, "both are counted on"
    behind_first = item.spans[0][1]
    for key in keys_of(cache):
        if key.kind == "tail" and key.position > behind_first:
            store.drop(key)
    begin.set()
    caller.to(engine).wait()
    assert caller.tokens == first.tokens
    assert cached(caller, "nvme") == behind_first
    assert asking.encoded == 4


def test_two_requests_with_embeddings_alone_share_by_their_content(open_engine):
    folder = tiny("4b")
    engine, _ = open_engine("4b")
    item = random_prompt(folder, np.random.default_rng(3), text=30, pictures=1)
    features = np.concatenate(vision(folder).encode(item.pixels))

    def ask(values):
        caller = Caller(item.ids)
        caller.request = dataclasses.replace(caller.request, image_starts=[item.spans[0][0]], image_features=values)
        return cached(caller.to(engine).wait())

    assert ask(features) == 0
    assert ask(features.copy()) == len(item.ids) - 1
    assert ask(features + 1) < item.spans[0][0]
    assert IMAGE in item.ids
