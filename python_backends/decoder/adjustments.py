"""What changes a sequence's logits before anything is drawn, as a short list of tokens: penalties, bias, bans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from python_backends.runtime.base import Float32, Int32

BAN = -1e30
"""Added to a logit so that its token is never drawn; finite, so that no difference of two becomes NaN."""


@dataclass(frozen=True)
class Penalties:
    """How tokens that occurred are treated. The neutral values are 1, 0 and 0."""

    repetition: float = 1.0
    """Logits of every token of prompt and answer are divided by it where positive, else multiplied (arXiv
    1909.05858)."""
    presence: float = 0.0
    """Taken from the logit of every token of the answer (OpenAI)."""
    frequency: float = 0.0
    """Taken from the logit for each time the token occurs in the answer (OpenAI)."""

    @property
    def neutral(self) -> bool:
        """Whether they change nothing."""
        return self.repetition == 1.0 and self.presence == 0.0 and self.frequency == 0.0


class Adjustments:
    """The list of one sequence, kept up to date token by token.

    The graph computes for every listed token ``logit' = (logit > 0 ? logit / factor : logit · factor) + bias``.

    Args:
        penalties: of the request.
        bias: token id → number added to its logit.
        prompt: ids that the repetition penalty counts from the start.
        banned: ids that must not be drawn until `allow` is called (end of sequence before ``min_tokens``).
    """

    def __init__(
        self,
        penalties: Penalties,
        bias: Mapping[int, float],
        prompt: Iterable[int] = (),
        banned: Sequence[int] = (),
    ) -> None:
        self._penalties = penalties
        self._place: dict[int, int] = {}
        self._banned = tuple(banned)
        self._ids: NDArray[np.int32] = np.empty(16, np.int32)
        self._factor: NDArray[np.float32] = np.empty(16, np.float32)
        self._bias: NDArray[np.float32] = np.empty(16, np.float32)
        for token, value in bias.items():
            place = self._at(token)  # first: it may replace the arrays
            self._bias[place] += value
        for token in self._banned:
            self._at(token)
        if penalties.repetition != 1.0:
            for token in set(prompt):
                place = self._at(token)
                self._factor[place] = penalties.repetition
        self._answered: set[int] = set()

    def __len__(self) -> int:
        return len(self._place)

    def add(self, token: int) -> None:
        """Note a token of the answer."""
        penalties = self._penalties
        if penalties.neutral:
            return
        place = self._at(token)
        self._factor[place] = penalties.repetition
        self._bias[place] -= penalties.frequency
        if token not in self._answered:
            self._answered.add(token)
            self._bias[place] -= penalties.presence

    def allow(self) -> None:
        """Lift the ban."""
        self._banned = ()

    def write(self, ids: Int32, factor: Float32, bias: Float32) -> None:
        """Fill one row, each [P] with P ≥ len(self); the rest is padding: id −1."""
        size = len(self)
        ids[:size], factor[:size], bias[:size] = self._ids[:size], self._factor[:size], self._bias[:size]
        ids[size:], factor[size:], bias[size:] = -1, 1.0, 0.0
        for token in self._banned:
            bias[self._place[token]] = BAN

    def _at(self, token: int) -> int:
        place = self._place.get(token)
        if place is not None:
            return place
        place = self._place[token] = len(self._place)
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._factor = np.concatenate([self._factor, np.empty_like(self._factor)])
            self._bias = np.concatenate([self._bias, np.empty_like(self._bias)])
        self._ids[place], self._factor[place], self._bias[place] = token, 1.0, 0.0
        return place
