"""Token ids → text, a piece at a time: never half a character, never part of a stop string."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class Detokenizer:
    """Turns the ids of one answer into text as they come, in constant time per token.

    Gemma spells a character that has no token of its own as ``<0xNN>`` byte tokens. Its text comes with the last of
    them; bytes that form no character come as U+FFFD. (The tokenizers library's own ``DecodeStream`` raises on such
    bytes, which a model is free to produce.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """Text that this token completes; empty for a special token and while a character is incomplete."""
        byte = BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "")
        if byte:
            return self._bytes.decode(bytes([int(byte[1], 16)]))
        return self.finish() + str(self._tokenizer.decode([token_id], skip_special_tokens=True))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, or nothing."""
        return self._bytes.decode(b"", final=True)


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
