"""Every request feature over a real decoder: what a sequence gets is what it would have got alone, drawn plainly."""

import collections
import dataclasses
import time

import numpy as np
import pytest

from python_backends.config import Config
from python_backends.decoder.drafts import StepCost
from python_backends.decoder.engine import Engine
from python_backends.decoder.grammar import GrammarCompiler
from python_backends.decoder.token_bytes import TokenBytes
from tests.checkpoints import EOS, FIRST_TEXT, VOCAB, tiny
from tests.driver import decoder
from tests.python_backends.decoder.callers import Caller, alone, prompt, word_tokenizer

PLAIN = Config(prefill_chunk=16, max_draft=0, quantum_tokens=0)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def open_engine(tokenizer):
    engines = []

    def open_(config=PLAIN, slots=4, context=512):
        engines.append(Engine(decoder(tiny("1b"), num_slots=slots, context=context), tokenizer, config))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.check_integrity()
        engine.close()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def repeating(seed, length=60):
    """A prompt that repeats itself, so that prompt lookup has something to find."""
    part = prompt(seed, 6)
    return (part * (length // 6 + 1))[:length]


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.1, "top_p": 0.95, "seed": 5}], ids=["greedy", "sampled"])
def test_drafts_change_no_token(open_engine, sampled):
    plain, drafting = open_engine(), open_engine(Config(prefill_chunk=16, max_draft=4))
    for seed in range(6):
        ids = repeating(seed)
        # A bias towards a few tokens makes the answer repeat itself too.
        bias = tuple((token, 12.0) for token in ids[:3])
        expected = alone(plain, ids, max_tokens=80, logit_bias=bias, **sampled).tokens
        assert alone(drafting, ids, max_tokens=80, logit_bias=bias, **sampled).tokens == expected
    counts = drafting.stats.read()
    assert counts["accepted_tokens"] > 0
    assert counts["accepted_tokens"] < counts["drafted_tokens"], "the test must see rejected drafts as well"
    assert plain.stats.read()["drafted_tokens"] == 0


class HalfMoreForEachToken(StepCost):
    """Costs that do not depend on who else uses the machine."""

    def observe(self, rows, width, seconds):
        super().observe(rows, width, 1 + 0.5 * (width - 1))


def test_drafts_that_slow_the_others_down_more_than_they_gain_are_not_made(open_engine):
    drafting = open_engine(Config(prefill_chunk=16, max_draft=4))
    drafting._postprocessor.cost = HalfMoreForEachToken()
    same = {"logit_bias": ((77, 100.0),), "max_tokens": 80}  # every draft is right
    assert set(alone(drafting, [77] * 8, **same).tokens) == {77}
    by_itself = drafting.stats.read()["accepted_tokens"]
    # Penalties exclude drafts, so three rows only pay for them.
    others = [Caller(prompt(seed, 8), presence_penalty=0.1, max_tokens=150).to(drafting) for seed in range(3)]
    wait_until(lambda: all(caller.tokens for caller in others))
    assert set(alone(drafting, [77] * 8, **same).tokens) == {77}
    assert not any(caller.ended.is_set() for caller in others)
    assert by_itself > 30
    assert drafting.stats.read()["accepted_tokens"] - by_itself < 10


def test_in_float32_nobodys_drafts_change_a_bit(open_engine):
    """Log-probabilities of the drawn tokens: one at a time without drafts, and in a crowd of which half drafts."""
    plain = open_engine(slots=1)
    crowded = open_engine(Config(prefill_chunk=16, max_draft=4, quantum_tokens=9), slots=5)
    cases = []
    for seed in range(10):
        ids = repeating(seed, 50)
        bias = tuple((token, 12.0) for token in ids[:3])
        cases.append((ids, {"max_tokens": 150, "logit_bias": bias} if seed % 2 else {"max_tokens": 150}))
    callers = [Caller(ids, **parameters).to(crowded) for ids, parameters in cases]
    for caller, (ids, parameters) in zip(callers, cases, strict=True):
        expected = alone(plain, ids, **parameters)
        assert caller.wait().tokens == expected.tokens
        assert caller.logprobs_of(0) == expected.logprobs_of(0)
    counts = crowded.stats.read()
    assert 0 < counts["accepted_tokens"] < counts["drafted_tokens"]


def test_set_aside_sequences_answer_as_if_alone(open_engine):
    plain = open_engine()
    crowded = open_engine(Config(prefill_chunk=16, quantum_tokens=3, max_draft=3), slots=2)
    cases = [(prompt(seed, 5 + 7 * seed), {"max_tokens": 30, "priority": seed % 3}) for seed in range(8)]
    expected = [alone(plain, ids, **parameters).tokens for ids, parameters in cases]
    callers = [Caller(ids, **parameters).to(crowded) for ids, parameters in cases]
    assert [caller.wait().tokens for caller in callers] == expected
    assert crowded.stats.read()["moves"] > 8


def test_several_answers_share_one_prefill_and_equal_single_requests(open_engine):
    engine = open_engine()
    ids, sampling = prompt(3, 50), {"temperature": 1.2, "max_tokens": 12}
    several = alone(engine, ids, n=4, seed=11, **sampling)
    prefilled = engine.stats.read()["prefill_tokens"]
    assert prefilled == 50 + 3
    for index in range(4):
        assert several.tokens_of(index) == alone(engine, ids, seed=11 + index, **sampling).tokens
        assert several.answer(index)[-1].usage.completion_tokens == 12
    assert len({tuple(several.tokens_of(index)) for index in range(4)}) > 1


def test_several_answers_of_a_one_token_prompt_and_cancelled_ones(open_engine):
    engine = open_engine()
    several = alone(engine, prompt(1, 1), n=3, temperature=1.0, seed=1)
    assert all(len(several.tokens_of(index)) == 8 for index in range(3))
    gone = Caller(prompt(1, 60), n=6, max_tokens=300).to(engine)
    gone.cancelled = True
    assert {piece.finish_reason for piece in gone.wait().pieces if piece.finish_reason} <= {"cancelled", "length"}


def test_penalties_bias_and_minimum_length(open_engine):
    engine = open_engine()
    ids = prompt(2, 30)
    biased = alone(engine, ids, logit_bias=((77, 100.0),), max_tokens=5)
    assert biased.tokens == [77] * 5
    two = {"logit_bias": ((77, 100.0), (78, 50.0)), "max_tokens": 60}
    assert set(alone(engine, ids, **two).tokens) == {77}
    varied = alone(engine, ids, frequency_penalty=2.0, **two).tokens
    assert len(set(varied)) > 1
    to_eos = {"logit_bias": ((EOS, 100.0),), "ignore_eos": False}
    assert alone(engine, ids, **to_eos).tokens == [EOS]
    held = alone(engine, ids, min_tokens=4, max_tokens=9, **to_eos)
    assert len(held.tokens) == 5
    assert held.tokens[-1] == EOS
    assert EOS not in held.tokens[:4]


def test_log_probabilities_of_answer_and_prompt(open_engine):
    engine = open_engine()
    ids = prompt(4, 90)
    caller = alone(engine, ids, logprobs=3, prompt_logprobs=2, max_tokens=4)
    answered = [top for piece in caller.pieces for top in piece.top_logprobs]
    drawn = [value for piece in caller.pieces for value in piece.logprobs]
    assert [top[0][0] for top in answered] == caller.tokens
    np.testing.assert_allclose([top[0][1] for top in answered], drawn, rtol=1e-6)
    assert all(len(top) == 3 and top[0][1] >= top[1][1] >= top[2][1] for top in answered)
    prompts = [piece.prompt_logprobs for piece in caller.pieces if piece.prompt_logprobs]
    assert len(prompts) == 1
    assert list(prompts[0].token_ids) == ids[1:]
    assert len(prompts[0].top) == len(prompts[0].logprobs) == 89
    # The same numbers from answering step by step: forced tokens are drawn tokens.
    forced = alone(engine, ids[:10], logit_bias=((ids[10], 100.0),), max_tokens=1)
    assert forced.tokens == [ids[10]]
    np.testing.assert_allclose(forced.last.logprobs[0], prompts[0].logprobs[9], atol=1e-4)


def test_an_answer_follows_its_grammar_alone_and_in_a_batch(open_engine, tokenizer):
    compiler = GrammarCompiler(TokenBytes(tokenizer, VOCAB, (EOS,)))
    engine = open_engine(Config(prefill_chunk=16, max_draft=4))
    choice = {"type": "choice", "choice": ["w40 w41 w42 ", "w43 "]}
    pattern = {"type": "regex", "regex": "(w5[0-9] ){3}"}
    callers = []
    for seed in range(6):
        grammar = compiler.compile(choice if seed % 2 else pattern)
        callers.append(Caller(prompt(seed, 20), grammar=grammar, ignore_eos=False, max_tokens=20).to(engine))
        callers.append(Caller(prompt(seed, 20)).to(engine))
    for number, caller in enumerate(callers):
        caller.wait()
        if number % 2 == 0:
            assert caller.last.finish_reason == "stop"
            allowed = choice["choice"] if (number // 2) % 2 else None
            assert caller.text in allowed if allowed else len(caller.text.split()) == 3
            assert all(word[1] == "5" for word in caller.text.split()) or allowed
    free = [caller.tokens for caller in callers[1::2]]
    assert free == [alone(engine, prompt(seed, 20)).tokens for seed in range(6)]


def test_the_seed_decides_and_no_seed_varies(open_engine):
    engine = open_engine()
    ids = prompt(6, 12)
    drawn = [tuple(alone(engine, ids, temperature=1.5, seed=9).tokens) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len({tuple(alone(engine, ids, temperature=1.5).tokens) for _ in range(4)}) > 1


def drawn_with(engine, seeds):
    """Answers of a few symbols to a prompt of the same few, so that drafts are always proposed and often right."""
    ids = [FIRST_TEXT + int(symbol) for symbol in np.random.default_rng(1).integers(0, 3, 48)]
    bias = tuple((FIRST_TEXT + symbol, 40.0) for symbol in range(3))
    callers = [Caller(ids, temperature=8.0, seed=seed, max_tokens=6, logit_bias=bias).to(engine) for seed in seeds]
    return [tuple(caller.wait().tokens) for caller in callers]


def test_drafts_change_no_draw_and_keep_the_distribution(open_engine):
    plain = open_engine(dataclasses.replace(PLAIN, max_queue=400), slots=8)
    drafting = open_engine(Config(prefill_chunk=64, max_draft=4, max_queue=400), slots=8)
    count = 250
    same = drawn_with(plain, range(count))
    assert drawn_with(drafting, range(count)) == same, "same seeds, same answers"
    assert drafting.stats.read()["accepted_tokens"] > 5  # how many pay is decided by the clock
    # Chi-square of two samples with seeds of their own, over pairs of tokens drawn where drafts propose.
    other = drawn_with(drafting, range(count, 2 * count))
    for position in (1, 3):
        found = [collections.Counter(tokens[position : position + 2] for tokens in sample) for sample in (same, other)]
        frequent = [pair for pair in found[0] | found[1] if found[0][pair] + found[1][pair] >= 10]
        assert len(frequent) >= 4
        cells = [(found[0][pair], found[1][pair]) for pair in frequent]
        rest = tuple(count - sum(column) for column in zip(*cells, strict=True))
        cells += [rest] if sum(rest) else []
        statistic = sum((first - second) ** 2 / (first + second) for first, second in cells)
        degrees = len(cells) - 1
        limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3  # 99.9 %, Wilson–Hilferty
        assert statistic < limit


def test_the_snapshot_counts_who_is_here_and_how_long_they_waited(open_engine):
    engine = open_engine(slots=2)
    callers = [Caller(prompt(seed, 12), max_tokens=400).to(engine) for seed in range(3)]
    wait_until(lambda: len(callers[0].tokens) >= 3)
    during = engine.snapshot()
    assert (during["running"], during["waiting"], during["slots"]) == (2, 1, 2)
    for caller in callers:
        caller.wait()
    wait_until(lambda: engine.idle)
    after = engine.snapshot()
    assert (after["running"], after["waiting"], after["sequences"]) == (0, 0, 0)
    assert after["totals"]["drawn_tokens"] >= 3
    waits = after["queue_times"]
    assert waits["counts"][-1] == 3
    assert waits["counts"] == sorted(waits["counts"])
    assert waits["sum_s"] > 0
