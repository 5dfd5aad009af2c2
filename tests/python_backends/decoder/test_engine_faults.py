"""Faults of the engine's own, and of callers: everybody is answered, and nothing goes on in a state nobody knows."""

import threading
import time

import pytest
from tokenizers import Tokenizer, decoders, models

from python_backends.config import Config
from python_backends.decoder.answers import AnswerWriter, Drawn
from python_backends.decoder.engine import Engine
from python_backends.decoder.parameters import Parameters
from python_backends.decoder.sequence import Request, make_sequence
from python_backends.decoder.tools import Tool
from python_backends.errors import InvalidParameterError, OverloadedError, ServerUnavailableError
from tests.checkpoints import tiny
from tests.driver import decoder
from tests.python_backends.decoder.callers import Caller, alone, prompt, word_tokenizer


class Clock:
    """The real one, until it is broken for the engine's thread."""

    broken = False

    def __call__(self):
        if self.broken and threading.current_thread().name == "wicore-engine":
            raise RuntimeError("the clock has stopped")
        return time.monotonic()


class BreakingTokenizer:
    """The real one, until it is broken."""

    def __init__(self):
        self.broken = False
        self._tokenizer = word_tokenizer()

    def __getattr__(self, name):
        if self.broken:
            raise RuntimeError("no text today")
        return getattr(self._tokenizer, name)


def running(engine, *args, **parameters):
    caller = Caller(*args, **parameters).to(engine)
    while not caller.pieces:
        time.sleep(0.001)
    return caller


def test_a_fault_of_the_engine_answers_everyone_and_is_told_to_its_owner():
    clock, told = Clock(), threading.Event()
    runtime = decoder(tiny("1b"), num_slots=1, context=4096)
    engine = Engine(runtime, word_tokenizer(), Config(), clock=clock, on_failure=told.set)
    callers = [running(engine, prompt(0, 9), max_tokens=4000)]
    callers += [Caller(prompt(seed, 9), max_tokens=4000).to(engine) for seed in (1, 2)]
    clock.broken = True
    assert {caller.wait().last.error.code for caller in callers} == {"internal"}
    assert told.wait(10)
    with pytest.raises(ServerUnavailableError):
        Caller(prompt(3, 9)).to(engine)
    engine.close()


def test_an_answer_that_cannot_be_written_ends_as_an_error_and_frees_its_slot():
    tokenizer = BreakingTokenizer()
    engine = Engine(decoder(tiny("1b"), num_slots=1, context=4096), tokenizer, Config())
    caller = running(engine, prompt(0, 9), max_tokens=4000)
    tokenizer.broken = True
    assert caller.wait().last.error.code == "internal"
    tokenizer.broken = False
    assert len(alone(engine, prompt(1, 9)).tokens) == 8
    engine.check_integrity()
    engine.close()


def test_a_caller_that_cannot_be_asked_has_gone_and_others_are_still_asked():
    engine = Engine(decoder(tiny("1b"), num_slots=2, context=4096), word_tokenizer(), Config())
    first, second = (running(engine, prompt(seed, 9), max_tokens=4000) for seed in (0, 1))
    del first.cancelled  # asking it raises from here on
    assert first.wait().last.finish_reason == "cancelled"
    assert not second.ended.is_set()
    second.cancelled = True
    assert second.wait().last.finish_reason == "cancelled"
    engine.close()


def test_requests_without_an_id_are_nobodys_to_stop():
    engine = Engine(decoder(tiny("1b"), num_slots=1, context=4096), word_tokenizer(), Config())
    caller = running(engine, prompt(0, 9), max_tokens=200)
    assert not engine.stop("")
    assert len(caller.wait().tokens) == 200
    engine.close()


def test_more_answers_than_can_wait_are_refused_as_such():
    engine = Engine(decoder(tiny("1b"), num_slots=2, context=256), word_tokenizer(), Config(max_queue=3))
    with pytest.raises(InvalidParameterError, match="room for 5 answers"):
        Caller(prompt(0, 9), n=6).to(engine)
    several = Caller(prompt(0, 9), n=5).to(engine).wait()
    assert all(len(several.tokens_of(index)) == 8 for index in range(5))
    engine.close()


def test_answers_that_wait_for_a_shared_beginning_have_their_places_in_the_queue():
    runtime = decoder(tiny("1b"), num_slots=2, context=512)
    engine = Engine(runtime, word_tokenizer(), Config(max_queue=3, prefill_chunk=8))
    several = Caller(prompt(0, 400), n=5).to(engine)  # fills both slots and the queue, once its prompt is computed
    with pytest.raises(OverloadedError):
        Caller(prompt(1, 9)).to(engine)
    while not several.pieces:
        engine.check_integrity()
    several.wait()
    engine.close()


def test_a_stop_string_counts_from_the_fewest_tokens_on():
    engine = Engine(decoder(tiny("1b"), num_slots=1, context=256), word_tokenizer(), Config())
    free = alone(engine, prompt(0, 20), max_tokens=30).tokens
    stop = f"w{free[2]} "
    assert len(alone(engine, prompt(0, 20), max_tokens=30, stop=(stop,)).tokens) == free.index(free[2]) + 1
    late = alone(engine, prompt(0, 20), max_tokens=30, stop=(stop,), min_tokens=8)
    again = [number for number, token in enumerate(free) if token == free[2] and number >= 8]
    assert len(late.tokens) == (again[0] + 1 if again else 30)
    engine.close()


def test_a_tool_call_that_is_cut_off_is_given_as_text():
    words = {"w3 ": 3, "[weather(city=": 5, '"Rome"': 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3 "))
    tokenizer.decoder = decoders.Fuse()
    pieces = []
    request = Request(
        [3],
        Parameters(max_tokens=2),
        pieces.append,
        tools=[Tool("weather", "", {"type": "object", "properties": {"city": {}}})],
    )
    spec = decoder(tiny("1b"), num_slots=1, context=16).spec
    sequence = make_sequence(request, 0, 0, 1, spec=spec, max_draft=0, now=0.0)
    writer = AnswerWriter(tokenizer)
    writer.begin(sequence)
    writer.write(Drawn(sequence, (5, 6), (-1.0, -1.0), finish_reason="length"))
    writer.close()
    assert "".join(piece.text for piece in pieces) == '[weather(city="Rome"'
    assert (pieces[-1].finish_reason, pieces[-1].tool_calls) == ("length", ())
