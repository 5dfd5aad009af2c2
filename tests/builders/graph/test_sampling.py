"""Sampling in the graph draws from the distribution that transformers' logits processors leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.builders.graph.sampling_graph import V, logits_of, sampler, words_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sampler(tmp_path_factory.mktemp("sampling"))


@pytest.fixture(scope="module")
def draw(run):
    """Logits [B, R, V] and the parameters of the filters → (next_token, logprob)."""

    def draw(logits, temperature, top_k, top_p, min_p, uniform):
        filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        outputs = run(logits, **filters, uniform=uniform)
        return outputs["next_token"], outputs["logprob"]

    return draw


def filtered(logits, temperature, top_k, top_p, min_p):
    """Probabilities [V] (float64) after transformers' processors, in the order its generate applies them."""
    scores = torch.tensor(logits)[None]
    processors = [TemperatureLogitsWarper(float(temperature))]
    processors += [TopKLogitsWarper(int(top_k))] if top_k else []
    processors += [TopPLogitsWarper(float(top_p))] if top_p < 1 else []
    processors += [MinPLogitsWarper(float(min_p))] if min_p else []
    for processor in processors:
        scores = processor(None, scores)
    return torch.softmax(scores[0].double(), -1).numpy()


rows = st.tuples(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.5]),  # temperature
    st.sampled_from([0, 1, 2, 5, 40, V, 1000]),  # top_k
    st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.05]),  # top_p
    st.sampled_from([0.0, 0.01, 0.2, 1.0]),  # min_p
    st.floats(0.001, 0.999),  # uniform
)


def columns(items):
    seeds, temperature, top_k, top_p, min_p, uniform = zip(*items, strict=True)
    return (
        np.stack([logits_of(seed) for seed in seeds])[:, None],
        temperature,
        top_k,
        top_p,
        min_p,
        np.array(uniform)[:, None],
    )


@settings(max_examples=200, deadline=None)
@given(items=st.lists(rows, min_size=1, max_size=5))
def test_every_row_is_the_inverse_of_transformers_filtered_distribution(draw, items):
    tokens, logprobs = draw(*columns(items))
    for item, token, logprob in zip(items, tokens[:, 0], logprobs[:, 0], strict=True):
        seed, temperature, *filters, uniform = item
        logits = logits_of(seed)
        assert logprob == pytest.approx(float(torch.log_softmax(torch.tensor(logits).double(), -1)[token]), abs=1e-5)
        if temperature == 0:
            assert token == logits.argmax()
            continue
        wanted = filtered(logits, temperature, *filters)
        order = np.argsort(-logits, kind="stable")
        reached = np.cumsum(wanted[order])
        position = int(np.flatnonzero(order == token)[0])
        assert wanted[token] > 0
        low = reached[position] - wanted[token]
        assert low - 1e-5 <= uniform <= reached[position] + 1e-5


@settings(max_examples=100, deadline=None)
@given(items=st.lists(rows, min_size=2, max_size=6))
def test_a_row_draws_the_same_token_whatever_the_batch(draw, items):
    together, logprobs = draw(*columns(items))
    alone = [draw(*columns([item])) for item in items]
    assert together[:, 0].tolist() == [int(token[0, 0]) for token, _ in alone]
    assert logprobs[:, 0].tolist() == [float(logprob[0, 0]) for _, logprob in alone]


def test_evenly_spread_numbers_draw_tokens_in_proportion(draw):
    count = 4000
    uniform = ((np.arange(count) + 0.5) / count)[None]
    logits = np.broadcast_to(logits_of(1), (1, count, V))
    tokens, _ = draw(logits, [0.8], [20], [0.9], [0.0], uniform)
    found = np.bincount(tokens[0], minlength=V) / count
    np.testing.assert_allclose(found, filtered(logits_of(1), 0.8, 20, 0.9, 0.0), atol=2 / count)


def test_greedy_takes_the_lowest_id_among_equal_logits(draw):
    logits = np.zeros((1, 1, V), np.float32)
    logits[0, 0, [40, 7, 80]] = 3
    tokens, _ = draw(logits, [0], [0], [1], [0], [[0.5]])
    assert tokens[0, 0] == 7


@pytest.mark.parametrize("vocab_size", [96, 513, 1536])  # three groups of 32, 513 of one, three of 512
def test_the_largest_logit_is_found_in_any_vocabulary(tmp_path, vocab_size):
    run_once = sampler(tmp_path, vocab_size)
    logits = np.random.default_rng(0).normal(0, 3, (2, 40, vocab_size)).astype(np.float32)
    assert run_once(logits)["next_token"].tolist() == logits.argmax(-1).tolist()
    for equals in ([0, 1, vocab_size - 1], [31, 32, 33], [vocab_size - 2, vocab_size - 1]):
        tied = np.full((1, 1, vocab_size), -5, np.float32)
        tied[0, 0, equals] = -2
        assert run_once(tied)["next_token"][0, 0] == equals[0]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures_stay_defined(draw, temperature):
    tokens, logprobs = draw(logits_of(3)[None, None], [temperature], [0], [1], [0], [[0.999]])
    assert 0 <= tokens[0, 0] < V
    assert np.isfinite(logprobs).all()
    if temperature < 1:
        assert tokens[0, 0] == logits_of(3).argmax()


def test_several_positions_of_a_row_are_drawn_independently(draw):
    logits = np.stack([logits_of(seed) for seed in range(6)])[None]
    uniform = np.linspace(0.1, 0.9, 6)[None]
    together, _ = draw(logits, [1.0], [0], [0.9], [0], uniform)
    alone = [draw(logits[:, [i]], [1.0], [0], [0.9], [0], uniform[:, [i]])[0][0, 0] for i in range(6)]
    assert together[0].tolist() == alone


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 12)),  # rows, positions, adjustments
    with_mask=st.booleans(),
)
def test_a_row_with_adjustments_and_mask_is_what_it_is_alone(run, seed, sizes, with_mask):
    rows, positions, width = sizes
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(V, width, replace=False) for _ in range(rows)])
    ids[rng.random(ids.shape) < 0.4] = -1  # padding anywhere, whole rows too
    factor, bias = rng.uniform(0.5, 2, ids.shape), rng.normal(0, 3, ids.shape)
    logits = rng.normal(0, 3, (rows, positions, V)).astype(np.float32)
    inputs = {
        "temperature": rng.choice([0.0, 1.0], rows),
        "uniform": rng.random((rows, positions)),
        "adjust_ids": ids,
        "adjust_factor": factor,
        "adjust_bias": bias,
    }
    allowed = rng.random((rows, positions, V)) < 0.3
    if with_mask:
        inputs["token_mask"] = words_of(allowed)
    together = run(logits, **inputs)
    for row in range(rows):
        used = ids[row] >= 0
        changed = logits[row].astype(np.float64)
        old = changed[:, ids[row][used]]
        changed[:, ids[row][used]] = (
            np.where(old > 0, old / factor[row][used], old * factor[row][used]) + bias[row][used]
        )
        if with_mask:
            changed[~allowed[row]] = -np.inf
        if inputs["temperature"][row] == 0:
            assert together["next_token"][row].tolist() == changed.argmax(-1).tolist()
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        for name in ("adjust_ids", "adjust_factor", "adjust_bias"):
            alone[name] = alone[name][:, used]  # without padding, in a row of padding only without a column
        single = run(logits[row : row + 1], **alone)
        assert single["next_token"][0].tolist() == together["next_token"][row].tolist()
        assert single["logprob"][0].tolist() == together["logprob"][row].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_of_one_token_draws_it_however_unlikely(run, temperature):
    for token in (0, 31, 32, 63, 64, V - 1):
        mask = words_of(np.arange(V) == token)[None, None]
        logits = logits_of(2)[None, None].copy()
        logits[0, 0, token] = -1e30  # a ban weighs less than a mask
        for uniform in (1e-7, 0.999999):
            outputs = run(logits, temperature=[temperature], uniform=[[uniform]], token_mask=mask)
            assert outputs["next_token"][0, 0] == token
            assert np.isfinite(outputs["logprob"]).all()


def test_targets_are_reported_and_not_drawn(run):
    logits = np.stack([logits_of(seed) for seed in range(4)]).reshape(2, 2, V)
    targets = np.array([[V - 1, -1], [-1, 0]])
    free = run(logits, temperature=[1.0, 0.0])["next_token"]
    outputs = run(logits, temperature=[1.0, 0.0], targets=targets, **{"token_mask": words_of(np.ones((2, 2, V), bool))})
    assert outputs["next_token"].tolist() == np.where(targets >= 0, targets, free).tolist()
    own = torch.log_softmax(torch.tensor(logits).double(), -1).numpy()
    wanted = np.take_along_axis(own, outputs["next_token"][..., None].astype(int), -1)[..., 0]
    np.testing.assert_allclose(outputs["logprob"], wanted, atol=1e-5)


@pytest.mark.parametrize("top_n", [1, 5, 20])
def test_the_most_likely_tokens_are_the_models_own(run, top_n):
    logits = np.stack([logits_of(seed) for seed in range(6)]).reshape(2, 3, V)
    changes = {"token_mask": words_of(np.arange(6 * V).reshape(2, 3, V) % 2 == 0), "temperature": [0.0, 2.0]}
    outputs = run(logits, top_n=[top_n], **changes)
    values, ids = torch.log_softmax(torch.tensor(logits).double(), -1).topk(top_n)
    np.testing.assert_array_equal(outputs["top_ids"], ids.numpy())
    np.testing.assert_allclose(outputs["top_logprobs"], values.numpy(), atol=1e-5)
    assert run(logits, **changes)["next_token"].tolist() == outputs["next_token"].tolist()
