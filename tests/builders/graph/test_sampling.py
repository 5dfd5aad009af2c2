"""Sampling in the graph draws from the distribution that transformers' logits processors leave."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from builders.graph.sampling import sample
from builders.graph.writer import GraphWriter
from builders.weights import WeightFile

V = 97
REAL, INTEGER = TensorProto.FLOAT, TensorProto.INT32


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """Runs the sampling graph alone: logits [B, R, V] and parameters → (next_token, logprob)."""
    folder = tmp_path_factory.mktemp("sampling")
    with WeightFile(folder / "sampling.weights") as weights:
        graph = GraphWriter(weights)
        graph.input("logits", REAL, ["B", "R", V])
        for name, dtype in (("temperature", REAL), ("top_k", INTEGER), ("top_p", REAL), ("min_p", REAL)):
            graph.input(name, dtype, ["B"])
        graph.input("uniform", REAL, ["B", "R"])
        sample(graph, "logits", next_token="next_token", logprob="logprob")
        graph.output("next_token", INTEGER, ["B", "R"])
        graph.output("logprob", REAL, ["B", "R"])
        graph.save(folder / "sampling.onnx")
    session = onnxruntime.InferenceSession(folder / "sampling.onnx", providers=["CPUExecutionProvider"])

    def run(logits, temperature, top_k, top_p, min_p, uniform):  # noqa: PLR0917 - the graph's inputs, in order
        feeds = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
        feeds = {name: np.asarray(value, np.float32) for name, value in feeds.items()}
        feeds |= {"top_k": np.asarray(top_k, np.int32), "uniform": np.asarray(uniform, np.float32)}
        return session.run(["next_token", "logprob"], {"logits": np.asarray(logits, np.float32), **feeds})

    return run


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


def logits_of(seed):
    return np.random.default_rng(seed).normal(0, 3, V).astype(np.float32)


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
