"""Random load on a real decoder: everyone is answered, every slot comes back, and tokens never depend on company."""

import gc
import random
import time

import psutil
import pytest

from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.errors import OverloadedError
from tests.checkpoints import tiny
from tests.driver import decoder
from tests.python_backends.decoder.callers import Caller, alone, prompt, word_tokenizer

SLOTS = 6
CROWDED = Config(prefill_chunk=16, max_queue=40, quantum_tokens=5, max_draft=3, max_overtakes=3)


def random_case(rng):
    """(prompt, parameters) of a short request."""
    ids = prompt(rng.randrange(10_000), rng.randint(1, 40))
    if rng.random() < 0.4:
        ids = (ids[:5] * 8)[: len(ids)]  # drafts find something
    parameters = {"max_tokens": rng.randint(1, 12), "priority": rng.randint(-1, 1)}
    if rng.random() < 0.4:
        parameters |= {"temperature": 1.2, "seed": rng.randrange(1000), "top_k": rng.choice([0, 20])}
    if rng.random() < 0.2:
        parameters |= {"frequency_penalty": 0.5, "repetition_penalty": 1.2}
    return ids, parameters


def submit(engine, caller):
    """Wait for room as a retrying client does."""
    while True:
        try:
            return caller.to(engine)
        except OverloadedError:
            time.sleep(0.001)


def run_load(engine, rng, count, check=None):
    """``count`` requests, a fifth of them cancelled on the way; every answer's end is awaited."""
    callers, load = [], rng.random()
    for number in range(count):
        ids, parameters = random_case(rng)
        if rng.random() < 0.1:
            parameters |= {"n": rng.randint(2, 3)}
        caller = submit(engine, Caller(ids, request_id=f"{load}-{number}", **parameters))
        callers.append((caller, ids, parameters))
        if rng.random() < 0.2:
            gone = rng.choice(callers)[0]
            gone.cancelled = True
            engine.stop(gone.request.request_id)
        if number % 25 == 0:
            engine.check_integrity()
    for caller, ids, parameters in callers:
        caller.wait()
        if check is not None and not caller.cancelled:
            check(caller, ids, parameters)
    return callers


def test_tokens_under_random_load_are_those_of_one_at_a_time_runs():
    tokenizer, rng = word_tokenizer(), random.Random(7)
    plain = Engine(decoder(tiny("1b"), num_slots=1, context=128), tokenizer, Config(max_draft=0, quantum_tokens=0))
    crowded = Engine(decoder(tiny("1b"), num_slots=SLOTS, context=128), tokenizer, CROWDED)
    compared = []

    def check(caller, ids, parameters):
        for index in range(parameters.get("n", 1)):
            seed = {"seed": parameters["seed"] + index} if "seed" in parameters else {}
            single = alone(plain, ids, **(parameters | seed | {"n": 1}))
            assert caller.tokens_of(index) == single.tokens
            assert caller.logprobs_of(index) == single.logprobs_of(0), "not the same bit for bit"
            compared.append(index)

    run_load(crowded, rng, 150, check)
    counts = crowded.stats.read()
    crowded.check_integrity()
    crowded.close()
    plain.close()
    assert len(compared) > 100
    assert counts["moves"] > 20
    assert counts["accepted_tokens"] > 0


def soak(count, growth_mb):
    tokenizer, rng = word_tokenizer(), random.Random(3)
    engine = Engine(decoder(tiny("1b"), num_slots=SLOTS, context=128), tokenizer, CROWDED)
    run_load(engine, rng, 300)
    reasons, resident = {"length": 0, "cancelled": 0}, []
    for _ in range(2):  # what grows with the requests grows in the second half as well
        for _ in range(count // 500):
            for caller, _, _ in run_load(engine, rng, 250):
                reasons[caller.last.finish_reason] += 1
        gc.collect()
        resident.append(psutil.Process().memory_info().rss / 2**20)
    growth = resident[1] - resident[0]
    engine.check_integrity()
    assert engine.idle, "a slot is still taken"
    engine.close()
    assert sum(reasons.values()) == count // 250 * 250
    assert growth < growth_mb
    return {"requests": sum(reasons.values()), **reasons, "growth_mb": round(growth, 1)}


def test_a_thousand_short_requests_leave_nothing_behind():
    print(soak(1000, 10))


@pytest.mark.soak
def test_ten_thousand_short_requests_leave_nothing_behind():
    print(soak(10_000, 10))
