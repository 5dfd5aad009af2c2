"""The prefill chunk follows the inter-token latency asked for."""

import pytest

from python_backends.decoder.budget import SMALLEST_CHUNK, PrefillBudget


def measured(token_s, decode_s, target_s, largest=512):
    budget = PrefillBudget(largest, target_s)
    for _ in range(60):
        budget.observe_prefill(64, 64 * token_s)
        budget.observe_decode(decode_s)
    return budget


def test_nobody_decoding_means_the_largest_chunk():
    assert measured(0.01, 0.02, 0.1).tokens(decoding=0) == 512


@pytest.mark.parametrize(("token_s", "decode_s", "target_s"), [(0.001, 0.02, 0.1), (0.0005, 0.05, 0.08)])
def test_a_decode_step_and_a_chunk_fit_the_target(token_s, decode_s, target_s):
    tokens = measured(token_s, decode_s, target_s).tokens(decoding=7)
    assert decode_s + tokens * token_s <= target_s * 1.001
    assert decode_s + (tokens + 2) * token_s > target_s * 0.99


def test_prefill_goes_on_even_where_the_target_cannot_be_met():
    assert measured(0.01, 0.2, 0.1).tokens(decoding=3) == SMALLEST_CHUNK


def test_the_first_chunk_beside_decoding_is_small():
    assert PrefillBudget(512, 0.1).tokens(decoding=1) == SMALLEST_CHUNK
    assert PrefillBudget(8, 0.1).tokens(decoding=1) == 8
