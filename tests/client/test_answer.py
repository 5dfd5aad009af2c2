"""Pieces of several answers, joined whatever the order in which they arrive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.answer import AnswersBuilder, Piece, Progress, TokenLogprob, ToolCall, Usage
from python_backends.errors import CancelledError

TOOL_CALLS = st.lists(st.builds(ToolCall, st.text(), st.text(), st.just("{}")), max_size=2).map(tuple)


@st.composite
def answers(draw: st.DrawFn, index: int) -> list[Piece]:
    """The pieces of one answer, in order."""
    pieces = []
    for text in draw(st.lists(st.text(max_size=3), max_size=4)):
        ids = draw(st.lists(st.integers(0, 99), max_size=3).map(tuple))
        pieces.append(
            Piece(
                text,
                ids,
                tuple(-0.5 * token for token in ids),
                tuple((TokenLogprob(token, -0.5),) for token in ids),
                index,
                tool_calls=draw(TOOL_CALLS),
            )
        )
    reason = draw(st.sampled_from(["stop", "length", "tool_calls"]))
    return [*pieces, Piece("", index=index, finish_reason=reason, usage=Usage(3, index))]


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[list[list[Piece]], list[Piece]]:
    """The pieces of some answers, by answer and as they arrive: each answer's own in order, the answers mixed."""
    each = [draw(answers(index)) for index in range(draw(st.integers(1, 4)))]
    order = draw(st.permutations([index for index, pieces in enumerate(each) for _ in pieces]))
    waiting = [iter(pieces) for pieces in each]
    return each, [next(waiting[index]) for index in order]


@given(arrivals())
def test_every_answer_gets_its_own_pieces_in_order(case: tuple[list[list[Piece]], list[Piece]]) -> None:
    each, arrived = case
    builder, progress = AnswersBuilder("id"), Progress(len(each))
    for now, piece in enumerate(arrived):
        assert not progress.complete
        builder.add(piece, now)
        progress.add(piece)
    progress.check()
    assert progress.complete
    for index, (pieces, answer) in enumerate(zip(each, builder.finish(), strict=True)):
        assert (answer.index, answer.usage.completion_tokens) == (index, index)
        assert answer.text == "".join(piece.text for piece in pieces)
        assert answer.token_ids == tuple(token for piece in pieces for token in piece.token_ids)
        assert answer.logprobs == tuple(-0.5 * token for token in answer.token_ids)
        assert [top[0].token_id for top in answer.top_logprobs] == list(answer.token_ids)
        assert answer.tool_calls == tuple(call for piece in pieces for call in piece.tool_calls)
        assert answer.finish_reason == pieces[-1].finish_reason
        places = [now for now, piece in enumerate(arrived) if piece.index == index]
        assert (answer.ttft_s, answer.duration_s) == (places[0], places[-1])


@given(st.permutations(range(3)), st.integers(0, 2))
def test_an_error_is_raised_once_nothing_more_will_come(order: list[int], broken: int) -> None:
    error = CancelledError("stopped")
    progress = Progress(3)
    for index in order:
        progress.check()
        progress.add(Piece("", index=index, finish_reason="stop", error=error if index == broken else None))
    with pytest.raises(CancelledError) as caught:
        progress.check()
    assert caught.value is error
