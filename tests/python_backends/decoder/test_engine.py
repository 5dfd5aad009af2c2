"""The engine over a real decoder: what a request gets does not depend on who shares the batch, and nothing is lost."""

import threading
import time

import numpy as np
import pytest

from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.decoder.parameters import Parameters
from python_backends.errors import (
    CancelledError,
    ContextLengthError,
    InvalidParameterError,
    OverloadedError,
    ServerUnavailableError,
)
from tests.checkpoints import VOCAB, tiny
from tests.driver import decoder
from tests.python_backends.decoder.callers import Caller, alone, prompt, word_tokenizer

SLOTS = 4


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def engine(tokenizer):
    built = Engine(decoder(tiny("1b"), num_slots=SLOTS, context=256), tokenizer, Config(prefill_chunk=16, max_queue=64))
    yield built
    built.close()


def test_tokens_are_the_same_alone_and_among_random_arrivals(engine):
    rng = np.random.default_rng(1)
    cases = []
    for seed in range(24):
        length, count = int(rng.integers(1, 60)), int(rng.integers(1, 20))
        sampled = {"temperature": 1.3, "top_p": 0.9, "seed": seed} if seed % 3 == 0 else {}
        cases.append((prompt(seed, length), {"max_tokens": count, **sampled}))
    expected = [alone(engine, ids, **parameters).tokens for ids, parameters in cases]
    callers = []
    for number, (ids, parameters) in enumerate(cases):
        caller = Caller(ids, **parameters).to(engine)
        callers.append(caller)
        if number % 5 == 0:
            disturber = Caller(prompt(100 + number, 40), max_tokens=50).to(engine)
            time.sleep(float(rng.uniform(0, 0.01)))
            disturber.cancelled = True
        engine.check_integrity()
    assert [caller.wait().tokens for caller in callers] == expected
    assert all(len(tokens) == parameters["max_tokens"] for tokens, (_, parameters) in zip(expected, cases, strict=True))


def test_the_text_is_that_of_the_tokens_and_usage_counts_them(engine):
    caller = alone(engine, prompt(0, 20), max_tokens=5)
    assert caller.text == "".join(f"w{token} " for token in caller.tokens)
    assert caller.last.finish_reason == "length"
    assert (caller.last.usage.prompt_tokens, caller.last.usage.completion_tokens) == (20, 5)
    assert all(value <= 0 for piece in caller.pieces for value in piece.logprobs)


def test_stop_tokens_stop_strings_and_echo(engine):
    free = alone(engine, prompt(0, 20), max_tokens=8)
    third = free.tokens[2]
    by_id = alone(engine, prompt(0, 20), stop_token_ids=(third,))
    first_seen = free.tokens.index(third)
    assert by_id.tokens == free.tokens[: first_seen + 1]
    assert by_id.last.finish_reason == "stop"
    assert by_id.text == "".join(f"w{token} " for token in free.tokens[:first_seen])
    stop = f"{free.tokens[1]} w{free.tokens[2]}"
    by_text = alone(engine, prompt(0, 20), stop=(stop,))
    assert by_text.text == free.text[: free.text.index(stop)]
    assert by_text.last.finish_reason == "stop"
    echoed = alone(engine, prompt(0, 3), echo=True, max_tokens=2)
    assert echoed.text == "".join(f"w{token} " for token in [*prompt(0, 3), *echoed.tokens])


def test_a_stop_request_and_a_cancelled_call_free_their_slots(engine):
    stopped = Caller(prompt(1, 10), request_id="one", max_tokens=200).to(engine)
    cancelled = Caller(prompt(2, 10), max_tokens=200).to(engine)
    while not (stopped.pieces and cancelled.pieces):
        time.sleep(0.001)
    assert engine.stop("one")
    cancelled.cancelled = True
    for caller in (stopped, cancelled):
        assert caller.wait().last.finish_reason == "cancelled"
        assert caller.last.usage.completion_tokens == len(caller.tokens)
    assert not engine.stop("one")
    engine.check_integrity()


class Slow:
    """A runtime's steps, counted when they begin, that take a given time at least."""

    def __init__(self, runtime, seconds):
        self.begun, self._step, self._seconds = 0, runtime.step, seconds
        runtime.step = self

    def __call__(self, inputs, **options):
        self.begun += 1
        time.sleep(self._seconds)
        return self._step(inputs, **options)


def test_a_stop_and_a_cancelled_call_free_the_slot_within_one_step(tokenizer):
    runtime = decoder(tiny("1b"), num_slots=1, context=4096)
    steps = Slow(runtime, 0.2)
    engine = Engine(runtime, tokenizer, Config())
    for stopping in ("request", "call"):
        caller = Caller(prompt(1, 10), request_id="one", max_tokens=4000).to(engine)
        while len(caller.tokens) < 3:
            time.sleep(0.001)
        before = steps.begun  # the step that runs now is among them
        if stopping == "request":
            assert engine.stop("one")
        else:
            caller.cancelled = True
        assert caller.wait().last.finish_reason == "cancelled"
        assert engine.idle
        assert steps.begun <= before + 1
    engine.close()


def test_answers_are_written_while_the_next_steps_run(tokenizer):
    runtime = decoder(tiny("1b"), num_slots=1, context=256)
    steps, overlapped = Slow(runtime, 0.001), []

    class Detained(Caller):
        """Does not return from its first pieces before a whole step has gone by."""

        def receive(self, piece):
            first, deadline = steps.begun, time.monotonic() + 20
            while len(overlapped) < 3 and steps.begun < first + 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            overlapped.append(steps.begun - first)
            super().receive(piece)

    engine = Engine(runtime, tokenizer, Config(max_draft=0))
    caller = Detained(prompt(1, 10), max_tokens=40).to(engine).wait()
    assert min(overlapped[:3]) >= 2, "the engine waited for the answer to be written"
    assert caller.tokens == alone(engine, prompt(1, 10), max_tokens=40).tokens
    engine.close()


def test_a_stop_reaches_a_request_that_comes_after_it(engine):
    assert not engine.stop("early")
    with pytest.raises(CancelledError):
        Caller(prompt(1, 10), request_id="early").to(engine)
    assert len(alone(engine, prompt(1, 10), request_id="other").tokens) == 8


def test_a_deadline_ends_an_answer_and_a_queue_timeout_ends_the_wait(tokenizer):
    now = [0.0]
    engine = Engine(decoder(tiny("1b"), num_slots=1, context=4096), tokenizer, Config(), clock=lambda: now[0])
    running = Caller(prompt(1, 10), max_tokens=4000, deadline_ms=2000).to(engine)
    while not running.pieces:
        time.sleep(0.001)
    queued = Caller(prompt(9, 10), queue_timeout_ms=1000).to(engine)
    now[0] = 1.5
    assert queued.wait().last.error.code == "deadline_exceeded"
    assert queued.tokens == []
    assert not running.ended.is_set()
    now[0] = 2.5
    assert running.wait().last.finish_reason == "deadline"
    assert len(running.tokens) == running.last.usage.completion_tokens
    engine.check_integrity()
    engine.close()


def test_a_full_queue_refuses_at_once_and_the_rest_is_answered(tokenizer):
    engine = Engine(decoder(tiny("1b"), num_slots=1, context=256), tokenizer, Config(max_queue=2))
    callers, refused = [], 0
    for seed in range(10):
        try:
            callers.append(Caller(prompt(seed, 10), max_tokens=30).to(engine))
        except OverloadedError:
            refused += 1
    assert refused >= 5
    assert all(caller.wait().last.finish_reason == "length" for caller in callers)
    engine.close()


def test_what_does_not_fit_is_refused_before_it_is_queued(engine):
    with pytest.raises(ContextLengthError, match="256 tokens; this server takes 1 to 255"):
        Caller(prompt(0, 256)).to(engine)
    with pytest.raises(InvalidParameterError, match="token ids"):
        Caller([VOCAB]).to(engine)
    with pytest.raises(InvalidParameterError, match="token ids"):
        Caller([5], stop_token_ids=(-1,)).to(engine)
    edge = alone(engine, prompt(0, 250), max_tokens=100)
    assert (len(edge.tokens), edge.last.finish_reason) == (6, "length")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e30),
        ("temperature", float("nan")),
        ("top_k", -2),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("min_p", -1.0),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("deadline_ms", 0),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("stop", ("x" * 1025,)),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(InvalidParameterError, match="stop string" if name == "stop" else name):
        Parameters(**({"max_tokens": 8} | {name: value}))


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(tokenizer):
    runtime = decoder(tiny("1b"), num_slots=2, context=128)
    real_step, broken = runtime.step, threading.Event()

    def step(inputs, **options):
        if broken.is_set():
            broken.clear()
            raise RuntimeError("the device is gone")
        return real_step(inputs, **options)

    runtime.step = step
    engine = Engine(runtime, tokenizer, Config())
    expected = alone(engine, prompt(0, 9)).tokens
    broken.set()
    failed = alone(engine, prompt(0, 9))
    assert failed.last.error.code == "internal"
    assert "device" not in str(failed.last.error)
    assert alone(engine, prompt(0, 9)).tokens == expected
    engine.close()


def test_closing_answers_everyone(tokenizer):
    engine = Engine(decoder(tiny("1b"), num_slots=2, context=256), tokenizer, Config())
    callers = [Caller(prompt(seed, 10), max_tokens=200).to(engine) for seed in range(6)]
    engine.close()
    assert all(caller.ended.is_set() for caller in callers)
    assert {caller.last.finish_reason for caller in callers} <= {"cancelled", "length"}
    with pytest.raises(ServerUnavailableError):
        callers[0].to(engine)
