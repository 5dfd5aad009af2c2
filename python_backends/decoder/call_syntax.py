"""The two forms in which Gemma 3 writes function calls, read from text that may not be complete yet.

``[name(argument=value, …), …]`` with Python literals, and ``{"name": …, "parameters": {…}}`` alone or in a list, each
also within a code fence; inside a fence and at the start of an answer the brackets of a pythonic call may be missing.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 64
FENCE = re.compile(r"```[ \t]*(?:json|tool_code|tool_call|python)?[ \t]*\n?")
_FENCE_STARTS = tuple(f"```{name}\n" for name in ("json", "tool_code", "tool_call", "python", ""))
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_ARGUMENT = re.compile(r"[^\W\d]\w*")
_NUMBER = re.compile(r"[-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_NUMBER_CHARACTERS = re.compile(r"[-+.\w]+")
_WORDS: dict[str, Any] = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_ESCAPES = dict(zip("bfnrtav0", "\b\f\n\r\t\a\v\0", strict=True)) | {mark: mark for mark in "\\/\"'"} | {"\n": ""}
_SPACE = re.compile(r"\s*")

Call = tuple[str, dict[str, Any]]


class NotACall(Exception):  # noqa: N818 - an outcome, not an error
    """The text is something else."""


class Incomplete(Exception):  # noqa: N818 - an outcome, not an error
    """The text so far could be the beginning of a call; ``named``: a known function is already being called."""

    def __init__(self, *, named: bool) -> None:
        self.named = named


@dataclass
class CallReader:
    """Recursive descent over one candidate.

    Args:
        text: from the candidate's first character on.
        functions: argument names, in order, by function name. Other names are no calls.
        bare: a call may stand without brackets.
    """

    text: str
    functions: Mapping[str, Sequence[str]]
    bare: bool = False
    position: int = 0
    named: bool = False

    def read(self) -> list[Call]:
        """The calls; `position` is then behind them.

        Raises:
            NotACall, Incomplete: see there.
        """
        fence = self._open_fence()
        self._space()
        if self._peek() == "{":
            calls = [self._json_call()]
        elif self._peek() == "[":
            calls = self._list(self._bracketed_call, "]")
        elif self.bare or fence:
            calls = [self._python_call()]
        else:
            raise NotACall
        if fence:
            calls += self._rest_of_fence()
        if not calls:
            raise NotACall
        return calls

    def _open_fence(self) -> bool:
        if not self.text.startswith("`"):
            return False
        if any(start.startswith(self.text) for start in _FENCE_STARTS):
            raise Incomplete(named=False)
        found = FENCE.match(self.text)
        if not found:
            raise NotACall
        self.position = found.end()
        return True

    def _rest_of_fence(self) -> list[Call]:
        """More calls on the next lines, up to the closing fence."""
        calls: list[Call] = []
        while True:
            self._space()
            if self._peek() in ";,":
                self.position += 1
            elif self._peek() == "`":
                self._literal("```")
                return calls
            else:
                calls.append(self._json_call() if self._peek() == "{" else self._python_call())

    def _bracketed_call(self) -> Call:
        return self._json_call() if self._peek() == "{" else self._python_call()

    def _python_call(self) -> Call:
        name = self._known(self._word(_NAME))
        self._space()
        self._literal("(")
        self.named = True
        positional: list[Any] = []
        arguments: dict[str, Any] = {}

        def argument() -> None:
            word = _ARGUMENT.match(self.text, self.position)
            behind = _SPACE.match(self.text, word.end()) if word else None
            if word and behind and behind.end() == len(self.text):
                raise Incomplete(named=True)
            if word and behind and self.text[behind.end()] == "=":
                self.position = behind.end() + 1
                self._space()
                arguments[word[0]] = self._value()
            elif arguments:
                raise NotACall
            else:
                positional.append(self._value())

        self._list(argument, ")", opened=True)
        expected = self.functions[name]
        if len(positional) > len(expected):
            raise NotACall
        return name, {**dict(zip(expected, positional, strict=False)), **arguments}

    def _json_call(self) -> Call:
        fields: dict[str, Any] = {}

        def member() -> None:
            key = self._key()
            if key not in ("name", "parameters", "arguments", "type"):
                raise NotACall
            fields[key] = self._value()
            if key == "name":
                self._known(fields[key])
                self.named = True

        self._list(member, "}")
        arguments = fields.get("parameters", fields.get("arguments", {}))
        if "name" not in fields or not isinstance(arguments, dict):
            raise NotACall
        return fields["name"], arguments

    def _known(self, name: object) -> str:
        if not isinstance(name, str) or name not in self.functions:
            raise NotACall
        return name

    def _value(self, depth: int = 0) -> Any:
        first = self._peek()
        if depth > MAX_DEPTH:
            raise NotACall
        if first in "\"'":
            return self._string(first)
        if first == "[":
            return self._list(lambda: self._value(depth + 1), "]")
        if first == "{":
            members: dict[str, Any] = {}

            def member() -> None:
                key = self._key()
                members[key] = self._value(depth + 1)

            self._list(member, "}")
            return members
        if first.isalpha():
            word = self._word(_ARGUMENT)
            if word not in _WORDS:
                raise NotACall
            return _WORDS[word]
        return _number(self._word(_NUMBER_CHARACTERS))

    def _key(self) -> str:
        if self._peek() not in "\"'":
            raise NotACall
        key = self._string(self._peek())
        self._space()
        self._literal(":")
        self._space()
        return key

    def _string(self, quote: str) -> str:
        end = self.position + 1
        while True:
            if end >= len(self.text):
                raise Incomplete(named=self.named)
            if self.text[end] == quote:
                break
            end += 2 if self.text[end] == "\\" else 1
        literal = self.text[self.position : end + 1]
        self.position = end + 1
        return _unquote(literal)

    def _list(self, item: Callable[[], Any], close: str, *, opened: bool = False) -> list[Any]:
        """Items between the bracket at `position` (or just before it) and ``close``; a trailing comma is fine."""
        self.position += not opened
        items: list[Any] = []
        while True:
            self._space()
            if self._peek() == close:
                break
            items.append(item())
            self._space()
            if self._peek() == ",":
                self.position += 1
            elif self._peek() != close:
                raise NotACall
        self.position += 1
        return items

    def _word(self, pattern: re.Pattern[str]) -> str:
        """A word whose end is in sight."""
        found = pattern.match(self.text, self.position)
        if found is None:
            raise NotACall
        if found.end() == len(self.text):
            if pattern is _NAME and not any(name.startswith(found[0]) for name in self.functions):
                raise NotACall
            raise Incomplete(named=self.named)
        self.position = found.end()
        return found[0]

    def _literal(self, expected: str) -> None:
        there = self.text[self.position : self.position + len(expected)]
        if not expected.startswith(there):
            raise NotACall
        if there != expected:
            raise Incomplete(named=self.named)
        self.position += len(expected)

    def _peek(self) -> str:
        if self.position >= len(self.text):
            raise Incomplete(named=self.named)
        return self.text[self.position]

    def _space(self) -> None:
        found = _SPACE.match(self.text, self.position)
        self.position = found.end() if found else self.position


def _number(text: str) -> int | float:
    if not _NUMBER.fullmatch(text):
        raise NotACall
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not math.isfinite(number):  # JSON has no word for it
        raise NotACall
    return number


def _unquote(literal: str) -> str:
    """The value of a JSON or Python string literal; what is no escape in either stays as it is."""
    text = _ESCAPE.sub(_unescape, literal[1:-1])
    # Two escapes may be the halves of one character; half a character alone cannot be sent.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _unescape(found: re.Match[str]) -> str:
    body = found[1]
    if len(body) > 1:
        code = int(body[1:], 16)
        return chr(code) if code <= sys.maxunicode else found[0]
    return _ESCAPES.get(body, found[0])
