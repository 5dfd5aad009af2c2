"""The attention mass of KV blocks against what transformers' attention gives, and that nobody pays who does not ask."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from builders.checkpoint import open_checkpoint
from builders.quantize import Precision
from tests.checkpoints import FAMILIES, tiny
from tests.driver import FP32, Driver, decoder, step_inputs, vision
from tests.prompts import prompt
from tests.reference import reference

BLOCK = 16


def wanted_masses(folder, ids, pixels) -> np.ndarray:
    """[S, ceil(S / block)] of the middle global layer, from transformers."""
    text = open_checkpoint(folder).config.text
    global_layers = [layer for layer, kind in enumerate(text.layer_types) if kind == "global"]
    model = reference(folder)
    with torch.no_grad():
        found = model.model(**model._inputs(np.array(ids), pixels), output_attentions=True).attentions
    by_key = found[global_layers[len(global_layers) // 2]][0].mean(0).numpy()
    padded = np.pad(by_key, ((0, 0), (0, -len(ids) % BLOCK)))
    return padded.reshape(len(ids), -1, BLOCK).sum(2)


@pytest.mark.parametrize("family", FAMILIES)
def test_masses_are_those_of_transformers_in_chunks_and_single_tokens(family):
    folder = tiny(family)
    has_images = FAMILIES[family].vision is not None
    item = prompt(folder, np.random.default_rng(4), text=70, pictures=2 * has_images)
    wanted = wanted_masses(folder, item.ids, item.pixels)
    runtime = decoder(folder, FP32)
    driver = Driver(runtime, [item], vision(folder) if has_images else None)
    cut = item.spans[-1][1] if has_images else 50  # so that one chunk ends with an image
    found = {}
    step = runtime.step

    def observed(inputs, **options):
        inputs.attention_block = BLOCK
        outputs = step(inputs, **options)
        found[int(inputs.past_len[0] + inputs.logit_positions[0, -1] + 1)] = outputs.block_attention[0]
        return outputs

    runtime.step = observed
    driver.append([(0, cut)])
    for position in range(cut, len(item.ids)):
        driver.append([(position, position + 1)])
    assert len(found) > 10
    for length, masses in found.items():
        blocks = -(-length // BLOCK)
        assert not masses[blocks:].any()  # of the filler behind an odd chunk
        np.testing.assert_allclose(masses[:blocks], wanted[length - 1, :blocks], atol=1e-5)
        assert masses.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("precision", [FP32, Precision("int4", 16)], ids=str)
def test_rows_of_a_batch_get_their_own_masses(precision):
    runtime = decoder(tiny("4b"), precision, num_slots=3, context=96)
    ids = prompt(tiny("4b"), np.random.default_rng(0), text=90).ids
    alone = []
    for slot, count in enumerate((70, 20, 33)):
        outputs = runtime.step(step_inputs(slot, [ids[:count]], [0], attention_block=BLOCK))
        alone.append(outputs.block_attention[0])
    together = runtime.step(step_inputs(0, [ids[:70], ids[:20], ids[:33]], [0, 0, 0], attention_block=BLOCK))
    # Padded to 30 tokens the first row has no room: rows are computed one by one, and have unequal numbers of blocks.
    apart = runtime.step(step_inputs(0, [ids[69:70], ids[:20], ids[:30]], [69, 0, 0], attention_block=BLOCK))
    assert together.block_attention.shape == apart.block_attention.shape == (3, 5)
    for row, masses in enumerate(alone):
        np.testing.assert_allclose(together.block_attention[row, : len(masses)], masses, atol=1e-5)
        assert not together.block_attention[row, len(masses) :].any()
    for row in (0, 1):
        np.testing.assert_allclose(apart.block_attention[row, : len(alone[row])], alone[row], atol=1e-5)


def test_masses_change_nothing_else_and_are_absent_where_not_asked_for():
    runtime = decoder(tiny("1b"))
    ids = prompt(tiny("1b"), np.random.default_rng(0), text=40).ids
    plain = runtime.step(step_inputs(0, [ids], [0]), want_logits=True)
    asked = runtime.step(step_inputs(1, [ids], [0], attention_block=BLOCK), want_logits=True)
    np.testing.assert_array_equal(plain.logits, asked.logits)
    assert plain.block_attention is None
