"""Token ids → text, a piece at a time: never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns the ids of one answer into text as they come.

    A character whose bytes are spread over several tokens is given out with the last of them. Bytes that never become
    a character are given out as U+FFFD by `finish`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        """Text that this token completes; empty while a character is incomplete."""
        self._pending.append(token_id)
        piece: str | None = self._stream.step(self._tokenizer, token_id)
        if piece is None:
            return ""
        self._pending.clear()
        return piece

    def finish(self) -> str:
        """What is left at the end: the tokens of an incomplete character, or nothing."""
        text: str = self._tokenizer.decode(self._pending, skip_special_tokens=True) if self._pending else ""
        self._pending.clear()
        return text


class StopStrings:
    """Holds text back while it could still become a stop string, which itself is never given out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """(text that is safe to give out, whether a stop string was found)."""
        if not self._stops:
            return text, False
        self._held += text
        cut = _first(self._held.find(stop) for stop in self._stops)
        if cut is not None:
            safe, self._held = self._held[:cut], ""
            return safe, True
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        split = len(self._held) - keep
        safe, self._held = self._held[:split], self._held[split:]
        return safe, False

    def finish(self) -> str:
        """The text held back, when the answer ends for another reason."""
        held, self._held = self._held, ""
        return held


def _first(positions: Iterable[int]) -> int | None:
    return min((position for position in positions if position >= 0), default=None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
