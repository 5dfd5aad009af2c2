"""The answer's text, as it comes, split into text for the user and OpenAI-shaped tool calls."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from python_backends.decoder.call_syntax import Call, CallReader, Incomplete, NotACall
from python_backends.decoder.tools import Tool

_CANDIDATE = re.compile(r"[`\[{]")
_SEPARATORS = re.compile(r"[\s,;]*")
_CLOSING = re.compile(r"[)\]}`]")
SHORT = 256
"""Held characters up to which every new piece is read again at once; later only where it may close a call."""


@dataclass(frozen=True)
class ToolCall:
    """One call of a function; ``arguments`` is JSON text, as in OpenAI's API."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def as_json(self) -> dict[str, Any]:
        """An entry of OpenAI's ``tool_calls``."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Parsed:
    """What a piece of the answer turned out to be."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()


class ToolCallParser:
    """Streams text through, except where it may be a call of one of ``tools``, which is held until that is clear.

    A call comes whole. Text that turns out to be no call (a list, a JSON object, a code block) comes as text; blanks
    and commas around calls are dropped. The answer may hold several calls and text between them.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._functions = {tool.name: tool.argument_names for tool in tools}
        self._held = ""
        self._at_start = True  # nothing but blanks so far: a call may stand without brackets
        self._after_call = False
        self.unfinished = ""
        """A call that the answer's end cut off; set by `finish`."""

    def add(self, piece: str) -> Parsed:
        """The next piece of the answer → what can be given out."""
        self._held += piece
        if len(self._held) > SHORT + len(piece) and not _CLOSING.search(piece):
            return Parsed()
        return self._drain(ended=False)

    def finish(self) -> Parsed:
        """The rest, when the answer has ended. A call cut off in the middle goes to `unfinished`, not into the text."""
        return self._drain(ended=True)

    def _drain(self, *, ended: bool) -> Parsed:
        texts: list[str] = []
        calls: list[ToolCall] = []
        while self._ready(ended=ended):
            start = self._candidate()
            if start:
                texts.append(self._take(start))
                continue
            try:
                found = self._read()
            except NotACall:
                # A run of backticks is no fence as a whole, so none of its ends is one either.
                texts.append(self._take(max(1, len(self._held) - len(self._held.lstrip("`")))))
            except Incomplete as incomplete:
                if not ended:
                    break
                if incomplete.named:
                    self.unfinished, self._held = self._held, ""
                else:
                    texts.append(self._take(1))
            else:
                calls += [ToolCall(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in found]
        return Parsed("".join(texts), tuple(calls))

    def _ready(self, *, ended: bool) -> bool:
        """Whether there is something to decide on: blanks and commas wait for what follows them."""
        if self._after_call:
            rest = _SEPARATORS.sub("", self._held, count=1)
            self._held = rest if rest or ended else self._held
            return bool(rest)
        waits = self._at_start and not ended and not self._held.strip()
        return bool(self._held) and not waits

    def _candidate(self) -> int:
        """Where a call may begin in the held text; its length if nowhere."""
        if self._at_start:
            return 0
        found = _CANDIDATE.search(self._held)
        return found.start() if found else len(self._held)

    def _read(self) -> list[Call]:
        lead = len(self._held) - len(self._held.lstrip()) if self._at_start else 0
        reader = CallReader(self._held[lead:], self._functions, bare=self._at_start)
        calls = reader.read()
        self._held = self._held[lead + reader.position :]
        self._after_call = self._at_start = True
        return calls

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        if text.strip():
            self._at_start = self._after_call = False
        return text
