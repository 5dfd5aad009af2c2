"""The engine with a KV cache: answers are those without one, whatever was found, lost, shared or moved meanwhile."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest

from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.errors import InternalError
from python_backends.kv.identity import content_hash
from python_backends.kv.mover import Mover
from tests.checkpoints import IMAGE, tiny
from tests.driver import decoder, vision
from tests.prompts import prompt as random_prompt
from tests.python_backends.decoder.callers import Caller, alone, prompt, word_tokenizer
from tests.python_backends.kv.caches import MB, demote, open_cache, references

BLOCK, CONTEXT = 16, 512
PLAIN = Config(prefill_chunk=24, max_draft=0, quantum_tokens=0)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def open_engine(tokenizer, tmp_path):
    engines = []

    def open_(family="1b", config=PLAIN, slots=4, cached=True, folder=None, **sizes):
        runtime = decoder(tiny(family), num_slots=slots, context=CONTEXT, block_tokens=BLOCK)
        cache = open_cache(runtime.kv_layout, folder and tmp_path / folder, **sizes) if cached else None
        engines.append(Engine(runtime, tokenizer, config, cache=cache))
        return engines[-1], cache

    yield open_
    for engine in (each for each in engines if not each._closing):
        deadline = time.monotonic() + 10
        while not engine.idle and time.monotonic() < deadline:
            time.sleep(0.005)
        engine.check_integrity()
        if engine.cache is not None:
            assert not references(engine.cache), "a reference was not released"
            engine.cache.check_integrity()
        engine.close()


def cached(caller, tier="device"):
    return caller.last.usage.as_json()["cached_tokens"][tier]


def missed(caller):
    return caller.last.usage.as_json()["cache_miss"]


def keys_of(cache):
    """Every entry, children first."""
    return tuple(
        sorted((entry.key for entry in cache._manager._table), key=lambda key: (-key.position, key.kind != "tail"))
    )


def test_the_next_turn_computes_only_what_is_new(open_engine):
    plain, _ = open_engine(cached=False)
    engine, _ = open_engine()
    history = prompt(1, 100)
    for turn in range(4):
        expected = alone(plain, history, max_tokens=20)
        before = engine.stats.read()["prefill_tokens"]
        found = alone(engine, history, max_tokens=20)
        assert found.tokens == expected.tokens
        computed = engine.stats.read()["prefill_tokens"] - before
        assert computed == len(history) - cached(found)
        if turn:
            # All but the last drawn token, which nobody computed, and the new user turn.
            assert cached(found) == len(history) - 12 - 1
            assert missed(found) == "new"
        history = [*history, *found.tokens, *prompt(50 + turn, 12)]
    assert plain.stats.read()["prefill_tokens"] > 3 * engine.stats.read()["prefill_tokens"] / 2


def test_the_same_prompt_again_computes_one_token(open_engine):
    engine, _ = open_engine()
    ids = prompt(2, 90)
    first = alone(engine, ids, temperature=1.0, seed=3)
    again = alone(engine, ids, temperature=1.0, seed=3)
    assert again.tokens == first.tokens
    assert (cached(first), missed(first)) == (0, "new")
    assert (cached(again), missed(again)) == (89, "")
    assert engine.stats.read()["prefill_tokens"] == 91
    np.testing.assert_allclose(again.pieces[0].logprobs, first.pieces[0].logprobs, atol=1e-5)


def test_the_third_prompt_of_a_kind_starts_where_the_second_parted_from_the_first(open_engine):
    plain, _ = open_engine(cached=False)
    engine, _ = open_engine()
    system = prompt(3, 75)
    found = []
    for question in range(4):
        ids = [*system, *prompt(60 + question, 30)]
        caller = alone(engine, ids)
        assert caller.tokens == alone(plain, ids).tokens
        found.append((cached(caller), missed(caller)))
    branch = 75 // BLOCK * BLOCK
    assert found == [(0, "new"), (0, "no_tail"), (branch, "new"), (branch, "new")]


def test_salts_never_share(open_engine):
    engine, _ = open_engine()
    ids = prompt(4, 60)

    def ask(salt):
        caller = Caller(ids)
        caller.request.cache_salt = salt
        return cached(caller.to(engine).wait())

    assert [ask("a"), ask("b"), ask(""), ask("a"), ask("b"), ask("")] == [0, 0, 0, 59, 59, 59]


def test_prompt_logprobs_and_several_answers_are_complete(open_engine):
    plain, _ = open_engine(cached=False)
    engine, _ = open_engine()
    ids = prompt(5, 70)
    alone(engine, ids)
    wanted, found = (alone(each, ids, prompt_logprobs=2, max_tokens=3) for each in (plain, engine))
    assert cached(found) == 0
    parts = [piece.prompt_logprobs for piece in found.pieces if piece.prompt_logprobs]
    assert len(parts[0].token_ids) == 69
    assert found.tokens == wanted.tokens
    sampling = {"temperature": 1.2, "n": 3, "seed": 9}
    wanted, found = (alone(each, ids, **sampling) for each in (plain, engine))
    assert [found.tokens_of(index) for index in range(3)] == [wanted.tokens_of(index) for index in range(3)]
    assert found.answer(0)[-1].usage.as_json()["cached_tokens"]["device"] == 69
    assert found.answer(1)[-1].usage.as_json()["cache_miss"] == "shared"


def test_drafts_grammar_free_and_penalties_go_on_after_a_hit(open_engine):
    plain, _ = open_engine(cached=False)
    engine, _ = open_engine(config=dataclasses.replace(PLAIN, max_draft=4))
    part = prompt(6, 7)
    ids = part * 9
    bias = tuple((token, 12.0) for token in part[:3])
    for parameters in ({"logit_bias": bias}, {"frequency_penalty": 1.5}, {"temperature": 1.1, "seed": 4}):
        for _ in range(2):
            found = alone(engine, ids, max_tokens=60, **parameters)
            assert found.tokens == alone(plain, ids, max_tokens=60, **parameters).tokens
        assert cached(found) == len(ids) - 1
    follow = [*ids, *found.tokens, 77, 78]
    assert alone(engine, follow).tokens == alone(plain, follow).tokens


@pytest.mark.parametrize("mover", [None, Mover], ids=["at-once", "threads"])
@pytest.mark.parametrize("source", ["host", "nvme"])
def test_answers_from_lower_tiers_are_the_same(open_engine, source, mover):
    plain, _ = open_engine(cached=False)
    engine, cache = open_engine(folder="tier", mover=mover)
    ids = prompt(7, 120)
    first = alone(engine, ids)
    while not engine.idle:
        time.sleep(0.001)
    demote(cache, keys_of(cache), "device", "host")
    if source == "nvme":
        demote(cache, keys_of(cache), "host", "nvme")
    again = alone(engine, ids)
    assert again.tokens == first.tokens == alone(plain, ids).tokens
    assert cached(again, source) == 119


def test_a_restarted_server_goes_on_from_disk(open_engine):
    ids = prompt(8, 120)
    engine, cache = open_engine(folder="kept")
    first = alone(engine, ids)
    while not engine.idle:
        time.sleep(0.001)
    for source, target in (("device", "host"), ("host", "nvme")):
        demote(cache, keys_of(cache), source, target)
    engine.close()
    again = alone(open_engine(folder="kept")[0], ids)
    assert (again.tokens, cached(again, "nvme")) == (first.tokens, 119)


def test_what_vanishes_while_a_request_waits_is_computed(open_engine):
    engine, cache = open_engine(slots=1)
    ids = prompt(9, 100)
    first = alone(engine, ids)
    busy = Caller(prompt(10, 10), max_tokens=60).to(engine)
    while not busy.pieces:
        time.sleep(0.001)
    waiting = Caller(ids).to(engine)
    for key in keys_of(cache):
        if key.position == 2 * BLOCK and key.kind == "block":
            cache._memory["device"].drop(key)
    assert waiting.wait().tokens == first.tokens
    assert (cached(waiting), missed(waiting)) == (0, "lost")
    assert busy.wait().last.finish_reason == "length"


def test_cancelled_requests_keep_what_they_computed_and_release_what_they_held(open_engine):
    engine, _ = open_engine(slots=1)
    ids = prompt(11, 200)
    running = Caller(ids, max_tokens=200).to(engine)
    while not running.pieces:
        time.sleep(0.001)
    queued = [Caller(ids, max_tokens=100, queue_timeout_ms=20).to(engine), Caller(ids, max_tokens=100).to(engine)]
    queued[1].cancelled = True
    assert queued[0].wait().last.finish_reason == "deadline"
    assert queued[1].wait().last.finish_reason == "cancelled"
    running.cancelled = True
    running.wait()
    again = alone(engine, [*ids, *running.tokens, 5, 6])
    assert cached(again) >= len(ids) + len(running.tokens) - 1
    early = Caller(prompt(12, 400)).to(engine)
    early.cancelled = True
    assert early.wait().last.finish_reason in ("cancelled", "length")


def test_sequences_set_aside_answer_as_if_alone(open_engine):
    plain, _ = open_engine(cached=False)
    crowded, _ = open_engine(config=dataclasses.replace(PLAIN, quantum_tokens=3, max_draft=3), slots=2)
    system = prompt(13, 40)
    cases = [([*system, *prompt(seed, 5 + 7 * seed)], {"max_tokens": 30, "priority": seed % 3}) for seed in range(8)]
    expected = [alone(plain, ids, **parameters).tokens for ids, parameters in cases]
    for _ in range(2):
        callers = [Caller(ids, **parameters).to(crowded) for ids, parameters in cases]
        assert [caller.wait().tokens for caller in callers] == expected
    assert all(cached(caller) for caller in callers)
    assert crowded.stats.read()["moves"] > 8


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
    while not engine.idle:
        time.sleep(0.001)
    for source, target in (("device", "host"), ("host", "nvme")):
        demote(cache, keys_of(cache), source, target)
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


def test_many_requests_at_once_over_tiers_that_move_answer_as_alone(open_engine):
    plain, _ = open_engine(cached=False)
    engine, cache = open_engine(
        folder="crowd",
        config=dataclasses.replace(PLAIN, quantum_tokens=4, max_draft=2),
        device=MB // 8,
        host=MB // 8,
        nvme=8 * MB,
        mover=Mover,
    )
    systems = [prompt(30 + index, 40) for index in range(3)]
    cases = [[*systems[seed % 3], *prompt(40 + seed % 7, 10 + seed % 5)] for seed in range(30)]
    expected = {tuple(ids): alone(plain, ids, max_tokens=6).tokens for ids in cases}
    callers = []
    for number, ids in enumerate(cases):
        callers.append(Caller(ids, max_tokens=6).to(engine))
        if number % 6 == 5:
            gone = Caller(ids, max_tokens=100).to(engine)
            time.sleep(0.01)
            gone.cancelled = True
            engine.check_integrity()
    assert [caller.wait().tokens for caller in callers] == [expected[tuple(ids)] for ids in cases]
    assert sum(sum(caller.last.usage.as_json()["cached_tokens"].values()) for caller in callers) > 0
    assert cache.stats()["tiers"]["host"]["writes"]


def test_attention_masses_reach_the_books(open_engine):
    def masses(weight):
        engine, cache = open_engine(config=dataclasses.replace(PLAIN, hmt_attention_weight=weight))
        alone(engine, prompt(14, 100), max_tokens=40)
        return [entry.mass for entry in cache._manager._table if entry.key.kind == "block"]

    assert set(masses(0.0)) == {None}, "nobody asks what has no effect"
    known = [mass for mass in masses(0.5) if mass is not None]
    assert len(known) >= 6
    assert all(mass > 0 for mass in known)
    assert len(set(known)) > 1


@pytest.mark.parametrize("mover", [None, Mover], ids=["at-once", "threads"])
def test_tiers_of_a_few_entries_that_must_move_all_the_time_change_no_answer(open_engine, mover):
    plain, _ = open_engine(cached=False)
    engine, cache = open_engine(folder="small", device=MB // 8, host=MB // 8, nvme=8 * MB, mover=mover)
    rng = np.random.default_rng(5)
    histories = [prompt(20 + index, 60) for index in range(4)]
    for _ in range(24):
        index = int(rng.integers(len(histories)))
        ids = histories[index]
        found = alone(engine, ids, max_tokens=8)
        assert found.tokens == alone(plain, ids, max_tokens=8).tokens
        histories[index] = [*ids, *found.tokens, *prompt(int(rng.integers(1000)), 6)]
        if len(histories[index]) > 200:
            histories[index] = histories[index][:60]
        cache.check_integrity()
    tiers = cache.stats()["tiers"]
    assert tiers["host"]["writes"] > 10
    assert tiers["nvme"]["writes"] > 10
