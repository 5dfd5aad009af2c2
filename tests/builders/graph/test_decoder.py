"""The decoder graph computes what transformers computes, in float32, for every Gemma-3 size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from builders.checkpoint import open_checkpoint
from builders.graph import attention, write_decoder
from builders.graph.decoder import attention_precision
from builders.quantize import Precision, dequantize, quantize
from python_backends.runtime.onnxruntime import OnnxRuntimeDecoder
from tests.checkpoints import FAMILIES, IMAGE_FAMILIES, IMAGE_NAMES, NAMES, checkpoint, make_model, tiny
from tests.driver import FP32, Driver, decoder, model_shape, vision
from tests.prompts import Prompt, prompt, twenty
from tests.reference import Reference, reference

STEPS = 64
TOLERANCE = 1e-3
"""Of the largest logit: the project's bar. What is measured is 6e-6."""


def runtime_and_encoder(folder: Path, precision: Precision = FP32, **sizes: int):
    has_images = reference(folder).image_token_id is not None
    return decoder(folder, precision, **sizes), vision(folder, precision) if has_images else None


def generated(folder: Path, prompts: list[Prompt], precision: Precision = FP32, steps: int = STEPS, **sizes) -> Driver:
    runtime, encoder = runtime_and_encoder(folder, precision, num_slots=len(prompts), **sizes)
    driver = Driver(runtime, prompts, encoder)
    driver.prefill()
    driver.decode(steps - 1)
    return driver


def largest_error(ours: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(ours - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_64_greedy_tokens_of_20_prompts_equal_transformers(name):
    folder = checkpoint(name)
    prompts = twenty(folder)
    # Batches of five, whose lengths differ: rows are padded, and go idle when their prompt is shorter.
    for batch in (prompts[start : start + 5] for start in range(0, 20, 5)):
        driver = generated(folder, batch)
        for item, logits, tokens in zip(batch, driver.logits, driver.tokens, strict=True):
            # One pass over prompt and answer: if each token is the argmax given those before it, the sequence is
            # transformers' own greedy one.
            wanted = reference(folder).logits(np.array(item.ids + tokens[:-1]), item.pixels)
            assert largest_error(np.array(logits), wanted) < TOLERANCE
            assert tokens == wanted[len(item.ids) - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_those_of_transformers_generate(name):
    folder = checkpoint(name)
    pictures = 3 if name in IMAGE_NAMES else 0
    item = prompt(folder, np.random.default_rng(7), text=60, pictures=pictures)
    driver = generated(folder, [item])
    assert driver.tokens[0] == reference(folder).greedy(np.array(item.ids), item.pixels, STEPS)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_checkpoints_answer_with_many_different_tokens(family):
    # Guards the tests above: a checkpoint that repeats one token would prove little.
    driver = generated(tiny(family), [prompt(tiny(family), np.random.default_rng(1), text=40)])
    assert len(set(driver.tokens[0])) > 20


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_tokens_of_a_picture_see_its_later_tokens(family):
    folder = tiny(family)
    item = prompt(tiny(family), np.random.default_rng(5), text=30, pictures=1)
    runtime, encoder = runtime_and_encoder(folder)
    first, last = item.spans[0]
    logits = []
    for shift in (0, 1):
        driver = Driver(runtime, [item], encoder)
        driver.features[0][0, -1] += shift  # only the picture's last embedding
        driver.prefill()
        logits.append(np.array(driver.logits[0]))
    changed = np.abs(logits[0] - logits[1]).max(-1) > 1e-4
    assert not changed[:first].any()
    # The first row sees it directly where the window reaches forward without limit, as transformers' mask does.
    assert changed[first:last].all()


def test_image_rows_are_the_same_when_computed_a_few_at_a_time(tmp_path, monkeypatch):
    folder = tiny("12b")
    item = prompt(folder, np.random.default_rng(5), text=40, pictures=2)
    monkeypatch.setattr(attention, "_MAX_SCORES", 16 * 2 * len(item.ids) * 7)  # seven rows of two sequences
    opened = open_checkpoint(folder)
    write_decoder(opened, FP32, tmp_path)
    runtime = OnnxRuntimeDecoder(
        tmp_path, model_shape(opened.config), num_slots=2, max_context_length=256, memory_limit=2**30
    )
    driver = Driver(runtime, [item, item], vision(folder))
    driver.prefill([[30], [30]])
    wanted = reference(folder).logits(np.array(item.ids), item.pixels)
    for logits in driver.logits:
        assert largest_error(np.array(logits), wanted) < TOLERANCE


def dequantized_reference(folder: Path, precision: Precision) -> Reference:
    """transformers with the weights that the quantized graph computes with."""
    model = Reference(folder)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if parameter.ndim == 2 and "position_embedding" not in name:
                turned = "mm_input_projection" in name  # stored [in, out], unlike every other
                weight = np.ascontiguousarray(parameter.numpy().T if turned else parameter.numpy())
                stored = attention_precision(precision) if "self_attn" in name else precision
                rounded = dequantize(quantize(weight, stored), weight.shape[1], stored.bits)
                parameter.copy_(torch.from_numpy(rounded.T.copy() if turned else rounded))
    return model


@pytest.mark.parametrize("family", ["270m", "12b"])  # K a multiple of the block, and not
@pytest.mark.parametrize(
    "precision",
    [
        Precision("int8"),
        Precision("int8", 0, symmetric=False),
        Precision("int4", 16),
        Precision("int4", 32, symmetric=False),
    ],
    ids=str,
)
def test_quantized_graph_computes_with_exactly_the_dequantized_weights(family, precision):
    folder = tiny(family)
    item = prompt(tiny(family), np.random.default_rng(3), text=60)
    runtime = decoder(folder, precision, accuracy_level=0)
    driver = Driver(runtime, [item])
    driver.prefill()
    wanted = dequantized_reference(folder, precision).logits(np.array(item.ids))
    # What remains is the float16 KV cache.
    assert largest_error(np.array(driver.logits[0]), wanted) < 1e-2


@pytest.mark.parametrize("family", ["1b", "4b"])
def test_int8_activations_add_less_error_than_int8_weights(family):
    folder = tiny(family)
    item = prompt(tiny(family), np.random.default_rng(3), text=60)
    full = reference(folder).logits(np.array(item.ids))
    weights = dequantized_reference(folder, Precision("int8")).logits(np.array(item.ids)) - full
    driver = Driver(decoder(folder, Precision("int8"), accuracy_level=4), [item])
    driver.prefill()
    added = np.array(driver.logits[0]) - full
    assert np.sqrt(np.mean(added**2)) < 2 * np.sqrt(np.mean(weights**2))


def test_fp16_stays_near_fp32_on_a_checkpoint_whose_residuals_overflow_float16(tmp_path):
    """As the published weights do: branch outputs are scaled so that the residual stream passes 65504."""
    model = make_model(FAMILIES["4b"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and name.endswith(
                ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
            ):
                parameter.copy_((1 + parameter) * 1e5 - 1)
    model.save_pretrained(tmp_path / "scaled")
    item = prompt(tiny("4b"), np.random.default_rng(2), text=50, pictures=1)
    wanted = Reference(tmp_path / "scaled")
    ids = torch.tensor(item.ids)[None]
    with torch.no_grad():
        states = wanted.model.model.language_model(ids, output_hidden_states=True).hidden_states
        overflown = wanted.model.half().model.language_model(ids).last_hidden_state
    assert max(float(state.abs().max()) for state in states[:-1]) > 65504
    assert not overflown.isfinite().all()  # what float16 throughout makes of it

    driver = generated(tmp_path / "scaled", [item], Precision("fp16"), steps=16)
    sequence = np.array(item.ids + driver.tokens[0][:-1])
    logits = np.array(driver.logits[0])
    assert np.isfinite(logits).all()
    assert largest_error(logits, Reference(tmp_path / "scaled").logits(sequence, item.pixels)) < 1e-2


def test_untied_head_is_its_own_matrix(tmp_path):
    family = FAMILIES["270m"]
    model = make_model(type(family)({**family.text, "tie_word_embeddings": False}))
    with torch.no_grad():
        model.lm_head.weight.normal_()
    model.save_pretrained(tmp_path / "untied")
    driver = generated(tmp_path / "untied", [prompt(tiny("270m"), np.random.default_rng(0), text=20)], steps=8)
    sequence = np.array(driver.prompts[0].ids + driver.tokens[0][:-1])
    assert largest_error(np.array(driver.logits[0]), Reference(tmp_path / "untied").logits(sequence)) < TOLERANCE
