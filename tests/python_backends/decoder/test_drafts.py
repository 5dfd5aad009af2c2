"""Drafts repeat what was seen, and are given up where they do not pay."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from python_backends.decoder.drafts import (
    FIRST_PAUSE,
    LONGEST_MATCH,
    LONGEST_TRUST,
    SHORTEST_MATCH,
    DraftGain,
    PromptLookup,
    StepCost,
    expected_tokens,
    worthwhile_length,
)


@given(tokens=st.lists(st.integers(0, 3), max_size=60), count=st.integers(1, 8))
def test_a_draft_is_what_followed_the_latest_longest_match(tokens, count):
    drafted = PromptLookup(tokens).propose(count)
    expected = []
    for size in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[len(tokens) - size :]]
        if ends and size <= len(tokens):
            expected = tokens[ends[-1] : ends[-1] + count]
            break
    assert drafted == expected


def test_drafts_that_are_never_right_are_tried_ever_more_rarely():
    gain, tried = DraftGain(), []
    for step in range(400):
        if gain.worthwhile(4, 1.5):
            tried.append(step)
            gain.observe(4, 0, 1.5)
    pauses = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert len(tried) < 20
    assert max(pauses) >= 8 * FIRST_PAUSE


def test_drafts_that_are_right_go_on():
    gain = DraftGain()
    for _ in range(100):
        assert gain.worthwhile(4, 2.0)
        gain.observe(4, 4, 2.0)


def test_a_draft_that_costs_more_than_it_can_yield_is_not_tried():
    assert not DraftGain().worthwhile(3, 4.5)
    assert expected_tokens(1.0, 3) == 4


@given(
    drafts=st.lists(st.tuples(st.integers(1, 5), st.floats(0, 1)), max_size=6),
    plain=st.integers(0, 8),
    costs=st.lists(st.floats(1, 4), min_size=6, max_size=6),
)
def test_a_step_is_as_wide_as_gives_all_its_rows_the_most_tokens_by_its_cost(drafts, plain, costs):
    def speed(length):
        return (plain + sum(expected_tokens(rate, min(own, length)) for own, rate in drafts)) / cost(1 + length)

    def cost(width):
        return 1.0 if width == 1 else costs[width - 2]

    chosen = worthwhile_length(drafts, plain + len(drafts), cost)
    assert chosen in range(1 + max((own for own, _ in drafts), default=0))
    assert all(
        speed(chosen) >= speed(length) - 1e-9 for length in range(1 + max((own for own, _ in drafts), default=0))
    )


def test_one_draft_that_pays_for_itself_does_not_slow_seven_others_down():
    def cost(width):
        return 1 + 0.2 * (width - 1)

    assert worthwhile_length([(4, 0.9)], 1, cost) == 4
    assert worthwhile_length([(4, 0.9)], 8, cost) == 0
    assert worthwhile_length([(4, 0.9)] * 8, 8, cost) == 4


def test_step_cost_is_the_measured_ratio_and_unknown_is_worth_a_try():
    cost = StepCost()
    assert cost.ratio(2, 5) == 1.0
    for _ in range(50):
        cost.observe(2, 1, 0.010)
        cost.observe(2, 5, 0.025)
    assert abs(cost.ratio(2, 5) - 2.5) < 1e-6


def test_one_slow_step_does_not_keep_drafts_off_for_ever():
    cost = StepCost()
    cost.observe(2, 5, 9.0)
    for _ in range(LONGEST_TRUST - 1):
        cost.observe(2, 1, 0.010)
        assert cost.ratio(2, 5) > 100
    cost.observe(2, 1, 0.010)
    assert cost.ratio(2, 5) == 1.0
    cost.observe(2, 5, 0.020)
    assert abs(cost.ratio(2, 5) - 2.0) < 1e-6
