"""What a step may ask of sampling, given to a whole decoder."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from python_backends.errors import InternalError
from tests.checkpoints import FIRST_TEXT, IMAGE, tiny
from tests.driver import decoder, step_inputs


def masks_of(allowed: np.ndarray) -> np.ndarray:
    return np.packbits(allowed, axis=-1, bitorder="little").view(np.int32)


def test_sampling_inputs_reach_the_graph_also_where_rows_go_one_by_one():
    runtime = decoder(tiny("270m"), num_slots=2, context=64)
    ids = np.random.default_rng(6).integers(FIRST_TEXT, IMAGE, 62).tolist()
    runtime.step(step_inputs(0, [ids[:30], ids[:58]], [0, 0]))
    rng = np.random.default_rng(0)
    allowed = rng.random((2, 8, runtime.spec.vocab_size)) < 0.5
    inputs = step_inputs(
        0,
        [ids[30:38], ids[58:]],
        [30, 58],
        targets=np.full((2, 8), -1, np.int32),
        adjust_ids=np.array([[400, -1], [300, 200]], np.int32),
        adjust_factor=np.ones((2, 2), np.float32),
        adjust_bias=np.array([[50, 0], [0, 50]], np.float32),
        token_mask=masks_of(allowed),
        top_n=3,
    )
    inputs.targets[0, 2], inputs.targets[1, 1] = 7, 8
    # Padded to 8 tokens the second row has no room: rows are computed one by one.
    found = runtime.step(inputs, want_logits=True)
    assert found.logits.shape == (2, 8, 512)
    assert found.top_ids.shape == found.top_logprobs.shape == (2, 8, 3)
    for row, count in ((0, 8), (1, 4)):
        for position in range(count):
            logits = found.logits[row, position]
            own = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            changed = logits.copy()
            for token, bias in zip(inputs.adjust_ids[row], inputs.adjust_bias[row], strict=True):
                changed[token] += bias if token >= 0 else 0
            changed[~allowed[row, position]] = -np.inf
            target = inputs.targets[row, position]
            token = found.next_token[row, position]
            assert token == (target if target >= 0 else changed.argmax())
            assert found.logprob[row, position] == pytest.approx(own[token], abs=1e-4)
            assert found.top_ids[row, position].tolist() == np.argsort(-logits)[:3].tolist()
            np.testing.assert_allclose(found.top_logprobs[row, position], np.sort(own)[:-4:-1], atol=1e-4)
    again = dataclasses.replace(inputs, top_n=0)
    assert runtime.step(again).top_ids is None
    roomy = decoder(tiny("270m"), num_slots=2, context=128)
    roomy.step(step_inputs(0, [ids[:30], ids[:58]], [0, 0]))
    together = roomy.step(inputs)
    assert together.next_token[0].tolist() == found.next_token[0].tolist()
    assert together.next_token[1, :4].tolist() == found.next_token[1, :4].tolist()


@pytest.mark.parametrize("family", ["1b", "4b"])
def test_what_a_step_leaves_out_costs_no_bytes_by_the_vocabulary(family):
    runtime = decoder(tiny(family))
    feeds = runtime._feeds(step_inputs(0, [[5], [6]], [0, 0]))
    given = {"input_ids", "past_len", "query_len", "logit_positions", "temperature", "top_k", "top_p", "min_p"}
    left_out = {name: array.nbytes for name, array in feeds.items() if name not in given}
    features = 4 * runtime.spec.hidden_size if runtime.spec.tokens_per_image else 0
    assert sum(left_out.values()) < 64 + features


def test_masks_and_counts_of_another_vocabulary_are_refused():
    runtime = decoder(tiny("1b"))
    with pytest.raises(InternalError, match="16 words"):
        runtime.step(step_inputs(0, [[5]], [0], token_mask=np.zeros((1, 1, 15), np.int32)))
    for top_n in (-1, 513):
        with pytest.raises(InternalError, match="top_n"):
            runtime.step(step_inputs(0, [[5]], [0], top_n=top_n))
