"""The engine with a KV cache: answers are those without one, whatever was found, lost or shared meanwhile."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from tests.python_backends.decoder.cached_engines import (
    BLOCK,
    PLAIN,
    cached,
    engines,
    keys_of,
    load_behind_a_gate,
    missed,
    until,
)
from tests.python_backends.decoder.callers import Caller, alone, prompt
from tests.python_backends.kv.caches import references


@pytest.fixture
def open_engine(tmp_path):
    with engines(tmp_path) as open_:
        yield open_


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


def test_others_decode_while_a_slot_is_filled(open_engine, monkeypatch):
    engine, _ = open_engine()
    ids = prompt(7, 90)
    first = alone(engine, ids)
    gate = load_behind_a_gate(engine, monkeypatch)
    other = Caller(prompt(8, 20), max_tokens=120).to(engine)
    until(lambda: other.tokens)
    again = Caller(ids).to(engine)
    until(lambda: len(engine._scheduler.running) == 2)
    begun = len(other.tokens)
    until(lambda: len(other.tokens) > begun + 20)
    assert not again.pieces
    gate.opened.set()
    assert again.wait().tokens == first.tokens
    assert cached(again) == 89
    other.wait()


def test_a_request_that_ends_while_its_slot_is_filled_leaves_nothing_behind(open_engine, monkeypatch):
    engine, cache = open_engine(slots=1)
    ids = prompt(7, 90)
    first = alone(engine, ids)
    gate = load_behind_a_gate(engine, monkeypatch)
    gone = Caller(ids).to(engine)
    until(lambda: engine._scheduler.running)
    gone.cancelled = True
    assert gone.wait().last.finish_reason == "cancelled"
    until(lambda: engine.idle)
    assert not references(cache)
    gate.opened.set()
    assert alone(engine, ids).tokens == first.tokens
