"""Penalties as a list equal penalties over the whole vocabulary, as transformers and OpenAI define them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from python_backends.decoder.adjustments import BAN, Adjustments, Penalties

VOCAB = 40
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=60)


def applied(adjustments, logits):
    """The graph's formula, by the list."""
    size = len(adjustments) + 3
    ids, factor, bias = np.empty(size, np.int32), np.empty(size, np.float32), np.empty(size, np.float32)
    adjustments.write(ids, factor, bias)
    out = logits.copy()
    for token, divisor, extra in zip(ids, factor, bias, strict=True):
        if token >= 0:
            out[token] = (out[token] / divisor if out[token] > 0 else out[token] * divisor) + extra
    return out


@given(
    prompt=TOKENS,
    answer=TOKENS,
    repetition=st.floats(0.5, 2.0),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-50, 50), max_size=30),
    seed=st.integers(0, 99),
)
def test_the_list_equals_the_definitions(prompt, answer, repetition, presence, frequency, bias, seed):
    logits = np.random.default_rng(seed).normal(0, 5, VOCAB).astype(np.float32)
    adjustments = Adjustments(Penalties(repetition, presence, frequency), bias, prompt)
    for token in answer:
        adjustments.add(token)
    expected = logits.copy()
    seen = [*prompt, *answer]
    if seen:
        processor = RepetitionPenaltyLogitsProcessor(penalty=repetition)
        expected = processor(torch.tensor([seen]), torch.tensor(logits[None]))[0].numpy()
    counts = np.bincount(answer, minlength=VOCAB) if answer else np.zeros(VOCAB)
    expected = expected - presence * (counts > 0) - frequency * counts
    for token, value in bias.items():
        expected[token] += value
    np.testing.assert_allclose(applied(adjustments, logits), expected, rtol=1e-4, atol=1e-3)


def test_banned_tokens_are_out_of_reach_until_allowed_and_keep_their_bias():
    adjustments = Adjustments(Penalties(), {1: 0.5}, banned=(1, 2))
    logits = np.zeros(VOCAB, np.float32)
    assert (applied(adjustments, logits)[[1, 2]] <= BAN / 2).all()
    adjustments.allow()
    assert applied(adjustments, logits)[[1, 2]].tolist() == [0.5, 0.0]


@pytest.mark.parametrize("values", [{"repetition": 1.5}, {"presence": 0.1}, {"frequency": -0.1}])
def test_neutral_means_nothing_changes(values):
    assert Penalties().neutral
    assert not Penalties(**values).neutral
