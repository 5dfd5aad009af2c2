"""A whole int4 decoder on our kernels: close to the stock kernels, and true to itself in any batch."""

import numpy as np
import pytest

from builders.checkpoint import open_checkpoint
from builders.quantize import Precision
from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.runtime.onnxruntime import OnnxRuntimeDecoder
from tests.checkpoints import tiny
from tests.driver import artefacts, model_shape, step_inputs
from tests.python_backends.decoder.callers import Caller, alone, prompt, word_tokenizer

INT4 = Precision("int4", 32)


def runtime(family="1b", kernels="auto", precision=INT4, level=4):
    return OnnxRuntimeDecoder(
        artefacts(tiny(family), precision, level),
        model_shape(open_checkpoint(tiny(family)).config),
        num_slots=12,
        max_context_length=256,
        memory_limit=2**30,
        num_threads=2,
        cpu_kernels=kernels,
    )


@pytest.mark.parametrize("family", ["1b", "4b"])
@pytest.mark.parametrize("precision", [INT4, Precision("int4", 128, symmetric=False), Precision("int8", 32)])
@pytest.mark.parametrize("length", [5, 120])
def test_logits_are_at_least_as_close_to_float_activations_as_those_of_the_stock_kernels(family, precision, length):
    ids = prompt(3, length)
    steps = [
        runtime(family, kernels, precision, level).step(step_inputs(0, [ids], [0]), want_logits=True).logits
        for kernels, level in (("auto", 4), ("onnxruntime", 4), ("auto", 0))
    ]
    ours, stock, exact = (value.ravel() for value in steps)
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert 0 < error < 1.2 * np.linalg.norm(stock - exact) / np.linalg.norm(exact) + 1e-3


def test_a_decode_step_gives_bitwise_the_same_logits_in_a_batch_as_alone():
    decoder = runtime()
    prompts = [prompt(seed, 5 + seed) for seed in range(12)]
    for slot, ids in enumerate(prompts):
        decoder.step(step_inputs(slot, [ids], [0]))
    state = [decoder.export_slot(slot, len(ids)) for slot, ids in enumerate(prompts)]
    past = [len(ids) for ids in prompts]
    batch = decoder.step(step_inputs(0, [[7]] * 12, past), want_logits=True).logits
    for slot, kept in enumerate(state):
        decoder.import_slot(slot, kept)
        single = decoder.step(step_inputs(slot, [[7]], past[slot : slot + 1]), want_logits=True).logits
        np.testing.assert_array_equal(single[0], batch[slot])


@pytest.mark.parametrize("drafts", [0, 4])
def test_tokens_are_the_same_in_a_crowd_as_alone(drafts):
    engine = Engine(runtime(), word_tokenizer(), Config(prefill_chunk=16, max_draft=drafts, max_queue=64))
    cases = [(prompt(seed, 3 + 5 * seed % 40), 5 + seed) for seed in range(16)]
    expected = [alone(engine, ids, max_tokens=count).tokens for ids, count in cases]
    callers = [Caller(ids, max_tokens=count).to(engine) for ids, count in cases]
    assert [caller.wait().tokens for caller in callers] == expected
    engine.close()
