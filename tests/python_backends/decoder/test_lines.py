"""Requests end with the line that their caller held open."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from python_backends.decoder.lines import MAX_LINES, REMEMBER_S, Lines
from python_backends.errors import InvalidParameterError, OverloadedError


class Holder:
    """Somebody who holds a line, until ``gone`` is set."""

    def __init__(self) -> None:
        self.gone = False
        self.ended = threading.Event()

    def has_gone(self) -> bool:
        return self.gone

    def end(self) -> None:
        assert not self.ended.is_set(), "ended twice"
        self.ended.set()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(clock: Clock) -> Iterator[Lines]:
    opened = Lines(clock)
    yield opened
    opened.close()


def opened(lines: Lines, name: str) -> Holder:
    holder = Holder()
    lines.open(name, holder.has_gone, holder.end)
    return holder


def test_requests_end_with_their_line_and_no_other(lines: Lines) -> None:
    holder, other = opened(lines, "a"), opened(lines, "b")
    of_a, of_b = lines.watched("a"), lines.watched("b")
    assert of_a is not None
    assert of_b is not None
    assert not of_a()
    holder.gone = True
    assert holder.ended.wait(10)
    assert of_a()
    assert not of_b()
    assert not other.ended.is_set()


def test_a_request_that_comes_after_its_line_was_cut_ends_too(lines: Lines) -> None:
    holder = opened(lines, "a")
    holder.gone = True
    assert holder.ended.wait(10)
    late = lines.watched("a")
    assert late is not None
    assert late()


def test_a_line_that_nobody_opened_ends_nothing(lines: Lines) -> None:
    assert lines.watched("") is None
    assert lines.watched("unknown") is None


def test_a_name_is_used_once_and_remembered_for_a_while(lines: Lines, clock: Clock) -> None:
    first = opened(lines, "a")
    with pytest.raises(InvalidParameterError, match="already"):
        opened(lines, "a")
    first.gone = True
    assert first.ended.wait(10)
    with pytest.raises(InvalidParameterError, match="already"):
        opened(lines, "a")
    clock.now += REMEMBER_S + 1
    second = opened(lines, "b")
    second.gone = True
    assert second.ended.wait(10)
    assert lines.watched("a") is None


def test_a_holder_who_cannot_be_asked_has_gone(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    ended = threading.Event()

    def asked() -> bool:
        raise RuntimeError("no answer")

    lines.open("a", asked, ended.set)
    assert ended.wait(10)
    assert "no answer" in caplog.text


def test_there_is_a_bound(lines: Lines) -> None:
    for number in range(MAX_LINES):
        opened(lines, str(number))
    with pytest.raises(OverloadedError, match=str(MAX_LINES)):
        opened(lines, "one more")
