"""Limits against a plain account of what each key did."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from client.gateway.limits import Limits
from python_backends.errors import RateLimitedError

CONCURRENT, PER_MINUTE = 2, 3


class LimitsMachine(RuleBasedStateMachine):
    """Two keys ask and end; what was admitted is written down and counted over again."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = Limits()
        self.now = 0.0
        self.open: dict[str, list[ExitStack]] = {"a": [], "b": []}
        self.admitted: dict[str, list[float]] = {"a": [], "b": []}

    @rule(key=st.sampled_from("ab"))
    def ask(self, key: str) -> None:
        stack = ExitStack()
        request = self.limits.request(key, CONCURRENT, PER_MINUTE, self.now)
        if len(self.open[key]) == CONCURRENT:
            with pytest.raises(RateLimitedError, match="in flight"):
                stack.enter_context(request)
            return
        refused = None
        try:
            stack.enter_context(request)
        except RateLimitedError as error:
            refused = error
        recent = [at for at in self.admitted[key] if at > self.now - 60]
        if refused is None:
            self.open[key].append(stack)
            self.admitted[key].append(self.now)
        else:
            assert refused.retry_after_s > 0
            assert recent, "a key that has not asked for a minute has its whole share"

    @precondition(lambda self: any(self.open.values()))
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([key for key, stacks in self.open.items() if stacks]))
        self.open[key].pop().close()

    @rule(seconds=st.floats(0, 50))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def no_window_has_more_than_the_bucket_and_its_refill(self) -> None:
        self.limits.check_integrity()
        for times in self.admitted.values():
            for first, begin in enumerate(times):
                for last in range(first, len(times)):
                    allowed = PER_MINUTE + (times[last] - begin) * PER_MINUTE / 60
                    assert last - first + 1 <= allowed + 1e-6


TestLimits = LimitsMachine.TestCase


def test_who_waits_as_told_is_admitted() -> None:
    limits = Limits()
    for _ in range(PER_MINUTE):
        with limits.request("a", 0, PER_MINUTE, 0.0):
            pass
    with pytest.raises(RateLimitedError) as caught, limits.request("a", 0, PER_MINUTE, 0.0):
        pass
    with limits.request("b", 0, PER_MINUTE, 0.0):  # another key's share is its own
        pass
    with limits.request("a", 0, PER_MINUTE, caught.value.retry_after_s + 1e-6):
        pass


def test_zero_is_no_limit() -> None:
    limits = Limits()
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(limits.request("a", 0, 0, 0.0))
    limits.check_integrity()
