"""The masks of a step's sequences, computed together: the same as one at a time, whatever fails."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from python_backends.decoder.grammar import Matcher
from python_backends.decoder.mask_pool import MaskJob, MaskPool
from python_backends.errors import InternalError, InvalidParameterError
from tests.python_backends.decoder.gemma_style import CORPUS, Setup, gemma_style, small_setup

FORMATS: list[dict[str, Any]] = [
    {"type": "json_object"},
    {"type": "regex", "regex": r"[a-z ]{1,20}(ab|a)*\d?"},
    {"type": "choice", "choice": ["red", "read", "reader", "北京"]},
]


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup(gemma_style(CORPUS, 320))


@pytest.fixture(scope="module")
def small() -> Setup:
    return small_setup()


@pytest.fixture
def pool() -> Iterator[MaskPool]:
    pool = MaskPool(threads=2)
    yield pool
    pool.close()


def test_the_pool_gives_the_masks_of_one_at_a_time_and_of_every_draft(setup: Setup, pool: MaskPool) -> None:
    grammars = [setup.grammar(response_format) for response_format in FORMATS]
    rng = np.random.default_rng(0)
    plain = [grammar.matcher() for grammar in grammars for _ in range(2)]  # two share a lexer
    pooled = [matcher.fork() for matcher in plain]
    last: list[tuple[int, ...]] = [()] * len(plain)
    for _ in range(15):
        drafts = [_draft(setup, matcher, rng) for matcher in plain]
        starts = np.cumsum([0, *(1 + len(draft) for draft in drafts)]).tolist()
        jobs = [
            MaskJob(matcher, row, accepted, draft)
            for matcher, row, accepted, draft in zip(pooled, starts, last, drafts, strict=False)
        ]
        out = np.full((starts[-1] + 1, setup.tokens.mask_words), 7, np.int32)
        assert pool.submit(jobs, out).result() == [None] * len(jobs)
        expected = np.full_like(out, 7)
        for matcher, start, draft in zip(plain, starts, drafts, strict=False):
            expected[start : start + 1 + len(draft)] = _rows(setup, matcher, draft)
        np.testing.assert_array_equal(out, expected)
        last = []
        for matcher in plain:
            token = int(rng.choice(sorted(setup.allowed(matcher))))
            last.append(() if matcher.has_ended else (token,))
            if not matcher.has_ended:
                matcher.accept(token)


def _draft(setup: Setup, matcher: Matcher, rng: np.random.Generator) -> tuple[int, ...]:
    """Up to three tokens, mostly fitting ones, sometimes an end of sequence or a wrong one."""
    ahead, draft = matcher.fork(), list[int]()
    while len(draft) < rng.integers(0, 4) and not ahead.has_ended:
        draft.append(int(rng.choice(sorted(setup.allowed(ahead)))))
        ahead.accept(draft[-1])
    if rng.random() < 0.3:
        draft.append(int(rng.integers(setup.vocab_size)))
    return tuple(draft)


def _rows(setup: Setup, matcher: Matcher, draft: Sequence[int]) -> NDArray[np.int32]:
    rows = np.full((1 + len(draft), setup.tokens.mask_words), -1, np.int32)
    ahead = matcher.fork()
    ahead.mask(rows[0])
    for place, token in enumerate(draft):
        if ahead.is_finished or token in setup.eos or token not in setup.allowed(ahead):
            break
        ahead.accept(token)
        ahead.mask(rows[place + 1])
    return rows


def test_an_error_stops_one_sequence_of_the_pool_and_no_other(small: Setup, pool: MaskPool) -> None:
    good = small.grammar({"type": "choice", "choice": ["ab"]}).matcher()
    wrong = small.grammar({"type": "choice", "choice": ["ab"]}).matcher()
    # Each step is within the limits until the counters multiply.
    heavy = small.grammar({"type": "regex", "regex": "((a{1,100}){1,100}){1,100}"}).matcher()
    expected = small.row()
    good.mask(expected)
    out = np.zeros((3, small.tokens.mask_words), np.int32)
    errors: list[Any] = pool.submit([MaskJob(good, 0), MaskJob(wrong, 1, (small.encode("(")[0],))], out).result()
    accepted: tuple[int, ...] = ()
    for _ in range(200):
        error, failed = pool.submit([MaskJob(good, 0), MaskJob(heavy, 2, accepted)], out).result()
        assert error is None
        if failed is not None:
            errors.append(failed)
            break
        accepted = (small.encode("a")[0],)
    assert errors[0] is None
    np.testing.assert_array_equal(out[0], expected)
    assert isinstance(errors[1], InternalError)
    assert isinstance(errors[2], InvalidParameterError)
    assert "cannot be followed further" in errors[2].message
    assert (out[1:] == -1).all()


def test_the_pool_refuses_rows_that_overlap_and_matchers_given_twice(small: Setup, pool: MaskPool) -> None:
    matcher, other = (small.grammar({"type": "choice", "choice": ["ab"]}).matcher() for _ in range(2))
    out = np.zeros((3, small.tokens.mask_words), np.int32)
    for jobs in (
        [MaskJob(matcher, 0, draft=(1,)), MaskJob(other, 1)],
        [MaskJob(matcher, 3)],
        [MaskJob(matcher, -1)],
        [MaskJob(matcher, 0), MaskJob(matcher, 1)],
    ):
        with pytest.raises(ValueError, match=r"rows|one job"):
            pool.submit(jobs, out)
