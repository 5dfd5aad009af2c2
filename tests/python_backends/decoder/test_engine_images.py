"""Prompts with pictures among others: the same tokens as alone, whatever chunks, drafts, set-asides and n do."""

import dataclasses

import numpy as np
import pytest

from python_backends.config import Config
from python_backends.decoder.engine import Engine
from tests.checkpoints import tiny
from tests.driver import decoder, vision
from tests.prompts import prompt
from tests.python_backends.decoder.callers import Caller, word_tokenizer

ALONE = Config(max_draft=0, quantum_tokens=0, prefill_chunk=512)
CROWDED = Config(prefill_chunk=16, quantum_tokens=4, max_draft=3, max_queue=200)


@pytest.fixture(scope="module")
def cases():
    """Prompts with none to three pictures and their embeddings; the last one ends with its picture."""
    folder = tiny("4b")
    encoder, found = vision(folder), []
    for seed in range(9):
        rng = np.random.default_rng(seed)
        item = prompt(folder, rng, text=int(rng.integers(1, 60)), pictures=seed % 4)
        found.append((item, None if item.pixels is None else np.concatenate(list(encoder.encode(item.pixels)))))
    encoder.close()
    item, features = found[1]
    found.append((dataclasses.replace(item, ids=item.ids[: item.spans[-1][1]]), features))
    return found


def asked(case, **parameters):
    item, features = case
    caller = Caller(item.ids, max_tokens=20, temperature=1.0, seed=5, **parameters)
    caller.request.image_starts = [start for start, _ in item.spans]
    caller.request.image_features = features
    return caller


def test_answers_about_pictures_do_not_depend_on_company(cases):
    tokenizer = word_tokenizer()
    plain = Engine(decoder(tiny("4b"), num_slots=1, context=512), tokenizer, ALONE)
    expected = [asked(case).to(plain).wait().tokens for case in cases]
    plain.close()
    crowded = Engine(decoder(tiny("4b"), num_slots=3, context=512), tokenizer, CROWDED)
    callers = [
        asked(case, n=3 if number % 3 == 0 else 1, priority=number % 2, prompt_logprobs=1 if number % 4 == 1 else None)
        for number, case in enumerate(cases)
    ]
    for caller in callers:
        caller.to(crowded)
    assert [caller.wait().tokens for caller in callers] == expected
    assert crowded.stats.read()["moves"] > 0, "nobody was set aside"
    crowded.check_integrity()
    crowded.close()
