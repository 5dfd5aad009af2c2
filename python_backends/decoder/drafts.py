"""Speculative decoding without a second model: what followed the last few tokens the last time they occurred.

Prompt lookup (A. Saxena, "Prompt Lookup Decoding", 2023). The draft is checked by the model itself in one step; since
every position is drawn as plain decoding would draw it, tokens and distribution are those of plain decoding, and only
the speed depends on how good the guess was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

LONGEST_MATCH, SHORTEST_MATCH = 4, 2
"""Tokens that must repeat before what followed them is proposed."""
SMOOTHING = 0.25
FIRST_RATE = 0.75
"""Share of right draft tokens that a new sequence is credited with."""
FIRST_PAUSE, LONGEST_PAUSE = 8, 256
"""Steps a sequence goes without drafts after they did not pay; doubled each time."""

LONGEST_TRUST = 2000
"""Steps after which a cost is measured anew: a single slow step would keep drafts off for ever."""


class PromptLookup:
    """Proposes drafts for one sequence. Memory and time per token are constant in the match lengths."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token of the prompt or the answer."""
        # Matches ending at the previous token are entered only now, when something follows them.
        end = len(self._tokens)
        for size in range(SHORTEST_MATCH, min(LONGEST_MATCH, end) + 1):
            self._after[tuple(self._tokens[end - size : end])] = end
        self._tokens.append(token)

    def propose(self, count: int) -> list[int]:
        """At most ``count`` tokens that followed the longest earlier occurrence of the latest ones; often none."""
        end = len(self._tokens)
        for size in range(min(LONGEST_MATCH, end), SHORTEST_MATCH - 1, -1):
            start = self._after.get(tuple(self._tokens[end - size :]))
            if start is not None:
                return self._tokens[start : start + count]
        return []


class DraftGain:
    """Decides per sequence whether drafts pay: the share accepted against what a wider step costs."""

    def __init__(self) -> None:
        self._rate = FIRST_RATE
        self._pause = FIRST_PAUSE
        self._wait = 0
        self._probing = False

    @property
    def rate(self) -> float:
        """The share of draft tokens to reckon with; that of a new sequence where it is to be measured again."""
        return FIRST_RATE if self._probing else self._rate

    def worthwhile(self, count: int, cost: float) -> bool:
        """Whether to try ``count`` draft tokens, when a step with them takes ``cost`` times a plain one."""
        if self._wait:
            self._wait -= 1
            self._probing = not self._wait
            return False
        return count + 1 >= cost and (self._probing or expected_tokens(self._rate, count) >= cost)

    def observe(self, proposed: int, accepted: int, cost: float) -> None:
        """A draft of ``proposed`` tokens had ``accepted`` right."""
        self._probing = False
        self._rate += SMOOTHING * (accepted / proposed - self._rate)
        if accepted + 1 >= cost:
            self._pause = FIRST_PAUSE
        elif expected_tokens(self._rate, proposed) < cost:
            self._wait, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)


def expected_tokens(rate: float, count: int) -> float:
    """Tokens a step with ``count`` drafts yields when each is right with probability ``rate``, given those before."""
    return sum(rate**position for position in range(count + 1))


def worthwhile_length(drafts: Sequence[tuple[int, float]], rows: int, cost: Callable[[int], float]) -> int:
    """How long a step's drafts may be: where all its rows together draw the most tokens by what the step costs.

    Every row of a step pays for its width, those without a draft too.

    Args:
        drafts: (tokens, share that is right) of the rows that have some.
        rows: that draw, with and without a draft.
        cost: of a step that many tokens wide, relative to a plain one.
    """

    def speed(length: int) -> float:
        drawn = sum(expected_tokens(rate, min(own, length)) for own, rate in drafts)
        return (rows - len(drafts) + drawn) / cost(1 + length)

    return max(range(1 + max((own for own, _ in drafts), default=0)), key=speed)


class StepCost:
    """What a step of a given width costs relative to a plain one, as measured lately."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}
        self._last: dict[tuple[int, int], int] = {}
        """Number of the step that was measured last."""
        self._steps = 0

    def observe(self, rows: int, width: int, seconds: float) -> None:
        """A step of ``rows`` × ``width`` tokens took so long."""
        self._steps += 1
        self._last[rows, width] = self._steps
        known = self._seconds.setdefault((rows, width), seconds)
        self._seconds[rows, width] = known + SMOOTHING * (seconds - known)

    def ratio(self, rows: int, width: int) -> float:
        """Cost relative to width 1; 1 where either was never seen, or not for long, so that it gets tried."""
        plain, wide = self._known(rows, 1), self._known(rows, width)
        return wide / plain if plain and wide else 1.0

    def knows_plain(self, rows: int) -> bool:
        """Whether a step without drafts was measured."""
        return self._known(rows, 1) is not None

    def _known(self, rows: int, width: int) -> float | None:
        if self._steps - self._last.get((rows, width), -LONGEST_TRUST) >= LONGEST_TRUST:
            self._seconds.pop((rows, width), None)
        return self._seconds.get((rows, width))
