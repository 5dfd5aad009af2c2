"""The sampling kernels draw what transformers' logits processors leave, and the very tokens of the CPU's graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from python_backends.runtime.gpu.interpreter import host_view
from tests.builders.graph.sampling_cases import CASES, p_value
from tests.builders.graph.sampling_graph import V, logits_of, sampler, words_of
from tests.python_backends.runtime.gpu.paged import Array
from tests.python_backends.runtime.gpu.sampling_kernels import KernelSampler

LARGE = 9001
"""Three pieces of the vocabulary, the last one not full, and two of the draw's chunks."""
ROWS = 32


@pytest.fixture(scope="module")
def small() -> KernelSampler:
    return KernelSampler(ROWS, V, list_size=32)


@pytest.fixture(scope="module")
def large() -> KernelSampler:
    return KernelSampler(ROWS, LARGE, list_size=64)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Array]]:
    return sampler(tmp_path_factory.mktemp("sampling"), LARGE)


def columns(inputs: dict[str, Any]) -> dict[str, Any]:
    """A case's inputs as arrays of one row."""
    return {name: value if np.ndim(value) > 1 else np.full(1, value) for name, value in inputs.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_draws_the_inverse_of_its_exact_distribution(small: KernelSampler, case: str) -> None:
    inputs, changed = CASES[case]
    count = 16
    uniform = (np.arange(count) + np.random.default_rng(len(case)).random(count)) / count
    inputs = columns({"temperature": 1.0, **inputs})
    if "token_mask" in inputs:
        inputs["token_mask"] = np.repeat(inputs["token_mask"], count, axis=1)
    found = small(np.broadcast_to(logits_of(1), (1, count, V)), **inputs, uniform=uniform[None])
    wanted = torch.softmax(torch.tensor(changed()).double(), -1).numpy()
    order = np.argsort(-changed(), kind="stable")
    reached = np.cumsum(wanted[order])
    for token, number in zip(found["next_token"][0], uniform, strict=True):
        rank = int(np.flatnonzero(order == token)[0])
        assert wanted[token] > 0
        assert reached[rank] - wanted[token] - 1e-6 <= number <= reached[rank] + 1e-6
    greedy = small(logits_of(1)[None, None], **{**columns(CASES[case][0]), "temperature": np.zeros(1)})
    assert greedy["next_token"][0, 0] == changed().argmax()
    own = torch.log_softmax(torch.tensor(logits_of(1)).double(), -1)
    assert greedy["logprob"][0, 0] == pytest.approx(float(own[changed().argmax()]), abs=1e-5)


def test_random_numbers_draw_the_distribution_by_chi_square(small: KernelSampler) -> None:
    inputs, changed = CASES["top_k"]
    wanted = torch.softmax(torch.tensor(changed()).double(), -1).numpy()
    rng = np.random.default_rng(0)
    found = np.zeros(V)
    for _ in range(4):
        logits = np.broadcast_to(logits_of(1), (1, ROWS, V))
        tokens = small(logits, **columns({"temperature": 1.0, **inputs}), uniform=rng.random((1, ROWS)))["next_token"]
        found += np.bincount(tokens[0], minlength=V)
    likely = wanted * found.sum() >= 5
    assert likely.sum() > 2
    assert not found[wanted == 0].any()
    counts = np.append(found[likely], found[~likely].sum())
    assert p_value(counts, np.append(wanted[likely], wanted[~likely].sum()) * found.sum()) > 1e-3


def random_step(seed: int) -> tuple[Array, dict[str, Array]]:
    """Logits [3, 2, LARGE] peaked, flat or full of ties, and parameters of every kind."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, rng.choice([0.02, 1, 4]), (3, 2, LARGE)).astype(np.float32)
    if seed % 3 == 0:
        logits = np.round(logits)
    ids = np.stack([rng.choice(LARGE, 40, replace=False) for _ in range(3)])
    ids[rng.random(ids.shape) < 0.3] = -1
    inputs = {
        "temperature": rng.choice([0.0, 0.3, 1.0, 2.5, 30.0], 3, p=[0.1, 0.2, 0.3, 0.3, 0.1]),
        "top_k": rng.choice([0, 0, 1, 5, 40, 1000, LARGE, 100_000], 3),
        "top_p": rng.choice([1.0, 1.0, 0.999, 0.9, 0.5, 0.05], 3),
        "min_p": rng.choice([0.0, 0.0, 0.01, 0.2, 1.0], 3),
        "uniform": rng.random((3, 2)),
        "adjust_ids": ids,
        "adjust_factor": rng.uniform(0.5, 2, ids.shape),
        "adjust_bias": rng.normal(0, 3, ids.shape),
    }
    if seed % 4 == 1:
        inputs["token_mask"] = words_of(rng.random((3, 2, LARGE)) < rng.choice([0.002, 0.3]))
    if seed % 2:
        for name in ("adjust_ids", "adjust_factor", "adjust_bias"):
            del inputs[name]
    return logits, inputs


@pytest.mark.parametrize("seed", range(16))
def test_a_step_draws_what_the_cpu_graph_draws(
    large: KernelSampler, graph: Callable[..., dict[str, Array]], seed: int
) -> None:
    logits, inputs = random_step(seed)
    found, wanted = large(logits, **inputs), graph(logits, **inputs)
    assert found["next_token"].tolist() == wanted["next_token"].tolist()
    np.testing.assert_allclose(found["logprob"], wanted["logprob"], atol=1e-5)
    for table in (large.drawing.counts, large.drawing.masses, large.drawing.totals, large.drawing.cursors):
        assert not host_view(table).any()


@pytest.mark.parametrize("seed", [3, 5])
def test_a_row_draws_the_same_token_whatever_the_batch_and_the_list(large: KernelSampler, seed: int) -> None:
    logits, inputs = random_step(seed)
    together = large(logits, **inputs)
    roomy = KernelSampler(1, LARGE)
    for row in range(3):
        for position in range(2):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            for name in ("uniform", "token_mask"):
                if name in alone:
                    alone[name] = alone[name][:, position : position + 1]
            single = roomy(logits[row : row + 1, position : position + 1], **alone)
            for name in ("next_token", "logprob"):
                assert single[name][0, 0] == together[name][row, position]


def test_among_equal_logits_ids_are_in_order(large: KernelSampler) -> None:
    logits = np.full((2, 3, LARGE), -1.5, np.float32)
    logits[:, 2, 17] = -0.0
    logits[:, 2, 5:4000] = 0.0
    uniform = np.array([[1e-7, 0.5, 0.25], [0.25, 0.99999994, 1e-7]], np.float32)
    outputs = large(logits, temperature=[1.0, 1e-3], top_k=[0, 800], uniform=uniform)
    first = int(0.5 * LARGE), 200, 799
    assert outputs["next_token"][0, :2].tolist() == [0, first[0]]
    assert outputs["next_token"][1].tolist() == [first[1], first[2], 5]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures_stay_defined(small: KernelSampler, temperature: float) -> None:
    outputs = small(logits_of(3)[None, None], temperature=[temperature], uniform=[[0.999]])
    assert np.isfinite(outputs["logprob"]).all()
    if temperature < 1:
        assert outputs["next_token"][0, 0] == logits_of(3).argmax()
    else:
        assert outputs["next_token"][0, 0] == np.argsort(-logits_of(3), kind="stable")[int(0.999 * V)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("token", [0, 31, 32, V - 1])
def test_a_mask_of_one_token_draws_it_however_unlikely(small: KernelSampler, temperature: float, token: int) -> None:
    mask = words_of(np.arange(V) == token)[None, None]
    logits = logits_of(2)[None, None].copy()
    logits[0, 0, token] = -1e30  # a ban weighs less than a mask
    for uniform in (1e-7, 0.999999):
        outputs = small(logits, temperature=[temperature], top_k=[5], uniform=[[uniform]], token_mask=mask)
        assert outputs["next_token"][0, 0] == token
        assert np.isfinite(outputs["logprob"]).all()


def test_targets_are_reported_and_not_drawn(small: KernelSampler) -> None:
    logits = np.stack([logits_of(seed) for seed in range(4)]).reshape(2, 2, V)
    targets = np.array([[V - 1, -1], [-1, 0]])
    free = small(logits, temperature=[1.0, 0.0])["next_token"]
    outputs = small(logits, temperature=[1.0, 0.0], targets=targets, token_mask=words_of(np.ones((2, 2, V), bool)))
    assert outputs["next_token"].tolist() == np.where(targets >= 0, targets, free).tolist()
    own = torch.log_softmax(torch.tensor(logits).double(), -1).numpy()
    wanted = np.take_along_axis(own, outputs["next_token"][..., None].astype(int), -1)[..., 0]
    np.testing.assert_allclose(outputs["logprob"], wanted, atol=1e-5)


@pytest.mark.parametrize("top_n", [1, 5, 20, 32])
def test_the_most_likely_tokens_are_the_models_own(large: KernelSampler, top_n: int) -> None:
    logits = np.random.default_rng(top_n).normal(0, 3, (1, 2, LARGE)).astype(np.float32)
    logits[0, 1] = np.round(logits[0, 1]) - 20  # ties, all negative
    outputs = large(logits, top_n=[top_n], token_mask=words_of(np.arange(2 * LARGE).reshape(1, 2, LARGE) % 2 == 0))
    own = torch.log_softmax(torch.tensor(logits).double(), -1).numpy()
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :top_n]
    np.testing.assert_array_equal(outputs["top_ids"], ids)
    np.testing.assert_allclose(outputs["top_logprobs"], np.take_along_axis(own, ids, -1), atol=1e-5)
