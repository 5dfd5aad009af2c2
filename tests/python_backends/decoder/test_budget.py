"""The prefill chunk keeps to the inter-token latency asked for."""

import random

import numpy as np
import pytest

from python_backends.decoder.budget import SMALLEST_CHUNK, PrefillBudget


class Machine:
    """Chunks and decode steps with a fixed cost, a cost per token, and noise, and an engine that works between them."""

    def __init__(self, fixed_s, token_s, decode_s, noise=0.03, seed=0, between_s=0.0):
        self.fixed_s, self.token_s, self.decode_s, self.noise = fixed_s, token_s, decode_s, noise
        self.between_s, self.now_s = between_s, 0.0
        self.rng = random.Random(seed)

    def run(self, budget, seconds):
        """One step after the work before it; how long both took."""
        began = self.now_s
        self.now_s += self.between_s * (1 + abs(self.rng.gauss(0, self.noise)))
        budget.begin_step(self.now_s)
        self.now_s += seconds
        budget.end_step(self.now_s)
        return self.now_s - began

    def chunk(self, tokens):
        return (self.fixed_s + self.token_s * tokens) * (1 + abs(self.rng.gauss(0, self.noise)))

    def decode(self):
        return self.decode_s * (1 + abs(self.rng.gauss(0, self.noise)))


def intrude(budget, machine, chunks):
    """Prompts computed in large chunks, some decoding, then a long prompt amid it: (waits in s, chunk sizes)."""
    for _ in range(7):
        budget.observe_prefill(128, machine.chunk(128))
    for _ in range(10):
        budget.observe_decode(machine.decode())
    waits, sizes = [], []
    for _ in range(chunks):
        tokens = budget.tokens(decoding=7)
        chunk_s, decode_s = machine.chunk(tokens), machine.decode()
        waits.append(machine.run(budget, chunk_s) + machine.run(budget, decode_s))
        budget.observe_prefill(tokens, chunk_s)
        budget.observe_decode(decode_s)
        sizes.append(tokens)
    return waits, sizes


@pytest.mark.parametrize("between_s", [0.0, 0.003])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("fixed_s", "token_s", "decode_s", "target_s"),
    [(0.02, 0.001, 0.03, 0.1), (0.035, 0.0012, 0.055, 0.15), (0.001, 0.0001, 0.005, 0.02), (0.2, 0.01, 0.2, 1.0)],
)
def test_the_target_is_kept_from_the_first_chunk_on_and_used(fixed_s, token_s, decode_s, target_s, seed, between_s):
    machine = Machine(fixed_s, token_s, decode_s, seed=seed, between_s=between_s)
    waits, sizes = intrude(PrefillBudget(512, target_s), machine, 200)
    assert np.percentile(waits, 99) <= target_s
    possible = (target_s - decode_s - 2 * between_s - fixed_s) / token_s
    assert np.mean(sizes[50:]) > 0.6 * min(512, possible)


def test_a_growing_context_is_followed():
    """Chunks that come later see more tokens and take longer."""
    machine = Machine(0.02, 0.0005, 0.03)
    budget = PrefillBudget(512, 0.1)
    intrude(budget, machine, 50)
    waits = []
    for _ in range(200):
        machine.fixed_s *= 1.003
        tokens = budget.tokens(decoding=7)
        chunk_s = machine.chunk(tokens)
        budget.observe_prefill(tokens, chunk_s)
        waits.append(chunk_s + machine.decode())
    assert np.percentile(waits, 99) <= 0.1


def test_one_slow_step_is_forgotten():
    machine = Machine(0.02, 0.001, 0.03)
    budget = PrefillBudget(512, 0.1)
    _, sizes = intrude(budget, machine, 50)
    budget.observe_prefill(sizes[-1], 5.0)
    budget.observe_decode(3.0)
    assert budget.tokens(decoding=7) < sizes[-1]
    for _ in range(30):
        tokens = budget.tokens(decoding=7)
        budget.observe_prefill(tokens, machine.chunk(tokens))
        budget.observe_decode(machine.decode())
    assert budget.tokens(decoding=7) > 0.8 * sizes[-1]


def test_a_slow_stretch_is_forgotten():
    """A busy neighbour: everything takes four times as long for a while."""
    machine = Machine(0.02, 0.001, 0.03)
    budget = PrefillBudget(512, 0.2)
    _, sizes = intrude(budget, machine, 50)
    machine.fixed_s, machine.token_s, machine.decode_s = 0.08, 0.004, 0.12
    intrude(budget, machine, 50)
    assert budget.tokens(decoding=7) == SMALLEST_CHUNK
    machine.fixed_s, machine.token_s, machine.decode_s = 0.02, 0.001, 0.03
    _, after = intrude(budget, machine, 60)
    assert np.mean(after[-10:]) > 0.7 * np.mean(sizes[-10:])


def test_nobody_decoding_means_the_largest_chunk():
    budget = PrefillBudget(512, 0.1)
    intrude(budget, Machine(0.02, 0.01, 0.03), 3)
    assert budget.tokens(decoding=0) == 512


def test_prefill_goes_on_even_where_the_target_cannot_be_met():
    budget = PrefillBudget(512, 0.1)
    intrude(budget, Machine(0.02, 0.01, 0.2), 3)
    assert budget.tokens(decoding=3) == SMALLEST_CHUNK


def test_the_first_chunk_beside_decoding_is_small():
    assert PrefillBudget(512, 0.1).tokens(decoding=1) == SMALLEST_CHUNK
    assert PrefillBudget(4, 0.1).tokens(decoding=1) == 4


def test_what_a_prompt_token_takes_is_that_of_large_chunks():
    budget = PrefillBudget(512, 0.1)
    assert budget.token_s == 0
    for tokens in (8, 512, 8, 8):
        budget.observe_prefill(tokens, 0.02 + 0.001 * tokens)
    assert budget.token_s == pytest.approx(0.532 / 512)
