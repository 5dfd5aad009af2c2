"""Every sampling parameter draws its exact distribution: transformers' processors, or OpenAI's definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.builders.graph.sampling_cases import CASES, drawn, p_value
from tests.builders.graph.sampling_graph import logits_of, sampler


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sampler(tmp_path_factory.mktemp("sampling"))


@pytest.mark.parametrize("case", CASES)
def test_a_fine_grid_of_numbers_draws_every_token_by_its_exact_probability(run, case):
    inputs, logits = CASES[case]
    count = 20_000
    wanted = torch.softmax(torch.tensor(logits()).double(), -1).numpy()
    found = drawn(run, inputs, (np.arange(count) + 0.5) / count)
    np.testing.assert_allclose(found / count, wanted, rtol=0, atol=1.5 / count)
    assert not found[wanted == 0].any()


@pytest.mark.parametrize("case", CASES)
def test_random_numbers_draw_the_distribution_by_chi_square(run, case):
    inputs, logits = CASES[case]
    count = 20_000
    wanted = torch.softmax(torch.tensor(logits()).double(), -1).numpy() * count
    found = drawn(run, inputs, np.random.default_rng(len(case)).random(count))
    # Tokens expected less than five times are counted together.
    rare = wanted < 5
    found = np.append(found[~rare], found[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    used = wanted > 0
    assert not found[~used].any()
    assert used.sum() > 2
    assert p_value(found[used], wanted[used]) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_greedy_takes_the_largest_changed_logit_and_reports_the_models_own_logprob(run, case):
    inputs, logits = CASES[case]
    inputs = {name: value if np.ndim(value) > 1 else np.full(1, value) for name, value in inputs.items()}
    outputs = run(logits_of(1)[None, None], **{**inputs, "temperature": np.zeros(1)})
    token = outputs["next_token"][0, 0]
    assert token == logits().argmax()
    own = torch.log_softmax(torch.tensor(logits_of(1)).double(), -1)
    assert outputs["logprob"][0, 0] == pytest.approx(float(own[token]), abs=1e-5)
