"""`response_format` as users write it → the text of an llguidance grammar, or an error that says what is wrong.

OpenAI's forms:   {"type": "text"}   {"type": "json_object"}   {"type": "json_schema", "json_schema": {"schema": {…}}}
Ours:             {"type": "regex", "regex": "…"}   Rust syntax, matched from start to end; digits (\\d) are 0–9
                  {"type": "choice", "choice": ["…", …]}
                  {"type": "grammar", "grammar": "…"}   llguidance's Lark dialect, or GBNF

What is checked here is what llguidance 1.9 does not bound itself: sizes (quadratic compilation) and intersections of
regular expressions (exponential whatever its fuel limits: 24 of them ran for more than 20 s).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import llguidance

from python_backends.errors import InvalidParameterError

MAX_BYTES = 65_536
"""Of a schema or a grammar; one that wide (2000 optional properties) compiles in 0.3 s."""
MAX_INTERSECTIONS = 8
"""Regular expressions that may have to hold at the same place."""
MAX_PATTERN_PROPERTIES = 64
"""In one schema: llguidance proves every two of them disjoint, 500 in more than 10 s."""
# One space, or a line break and its indentation: unbounded white space lets a model write it until max_tokens.
WHITE_SPACE = r" |\n[ \t]{0,64}"
# Any token that keeps the answer completable is allowed, however its text would be tokenized by itself.
EXACT = '\n%llguidance {"no_forcing": true}\n'

_PAYLOADS = {
    "text": None,
    "json_object": None,
    "json_schema": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
# Where & ~ < mean nothing: strings, comments, regular expressions.
_LITERALS = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\])+/', re.DOTALL)


def parse(text: str) -> Any:
    """The JSON value of a request's `response_format`.

    Raises:
        InvalidParameterError: not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidParameterError(f"response_format is not valid JSON: {error}") from error


def to_grammar(response_format: object) -> str | None:
    """The grammar's text for `llguidance.LLMatcher`; None for free text.

    Raises:
        InvalidParameterError: an unknown type or key, a value of the wrong kind, or one over the limits.
    """
    kind, payload = _kind_and_payload(response_format)
    if kind == "text":
        return None
    if kind == "json_object":
        return _exact("start: " + json_rule({"type": "object"}, "response_format"))
    if kind == "json_schema":
        return _exact("start: " + json_rule(_schema(payload), "response_format.json_schema.schema"))
    if kind == "regex":
        return _exact(f"start: ANSWER\nANSWER: /{_regex(payload)}/")
    if kind == "choice":
        return _exact("start: ANSWER\nANSWER: " + " | ".join(map(lark_string, _choices(payload))))
    return _exact(_lark(payload))


def json_rule(schema: Mapping[str, Any], where: str) -> str:
    """A schema as an operand of a Lark rule; its references are its own, wherever it is put.

    Raises:
        InvalidParameterError: too large, or too many patterns that hold together; ``where`` names the schema.
    """
    text = json.dumps(schema, ensure_ascii=False)
    _limit_bytes(text, where)
    patterns = _patterns_together(schema)
    if patterns > MAX_INTERSECTIONS:
        raise InvalidParameterError(
            f"{where} combines schemas that have {patterns} patterns in all; at most {MAX_INTERSECTIONS} can be "
            "enforced together: write allOf and $ref beside pattern as one pattern each"
        )
    keys = sum(
        len(node["patternProperties"]) for node in _nodes(schema) if isinstance(node.get("patternProperties"), dict)
    )
    if keys > MAX_PATTERN_PROPERTIES:
        raise InvalidParameterError(
            f"{where} has {keys} patternProperties; at most {MAX_PATTERN_PROPERTIES} are allowed"
        )
    options = {"whitespace_pattern": WHITE_SPACE, **_object(schema.get("x-guidance", {}), f"{where}.x-guidance")}
    return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def lark_string(text: str) -> str:
    """A literal of the Lark dialect."""
    return json.dumps(text, ensure_ascii=False)


def _kind_and_payload(value: object) -> tuple[str, Any]:
    fields = _object(value, "response_format")
    kind = fields.get("type")
    if not isinstance(kind, str) or kind not in _PAYLOADS:
        raise InvalidParameterError(f"response_format.type is {kind!r}; use one of {', '.join(_PAYLOADS)}")
    name = _PAYLOADS[kind]
    for key in fields:
        if key not in ("type", name):
            raise InvalidParameterError(f"response_format of type {kind} has no key {key!r}")
    if name is None:
        return kind, None
    if name not in fields:
        raise InvalidParameterError(f"response_format of type {kind} needs the key {name!r}")
    return kind, fields[name]


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidParameterError(f"{where} must be a JSON object, not {json.dumps(value, default=str)[:60]}")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidParameterError(f"{where} must be a text that is not empty")
    try:
        _limit_bytes(value, where)
    except UnicodeEncodeError as error:
        raise InvalidParameterError(f"{where} has half a surrogate pair at character {error.start}") from error
    return value


def _limit_bytes(text: str, where: str) -> None:
    size = len(text.encode())
    if size > MAX_BYTES:
        raise InvalidParameterError(f"{where} has {size} bytes; at most {MAX_BYTES} are allowed")


def _schema(payload: object) -> dict[str, Any]:
    fields = _object(payload, "response_format.json_schema")
    for key in fields:
        if key not in ("schema", "name", "description", "strict"):
            raise InvalidParameterError(
                f"response_format.json_schema has no key {key!r}; the schema goes into 'schema'"
            )
    if "schema" not in fields:
        raise InvalidParameterError("response_format.json_schema needs the key 'schema'")
    return _object(fields["schema"], "response_format.json_schema.schema")


def _regex(payload: object) -> str:
    return llguidance.regex_to_lark(_text(payload, "response_format.regex"), use_ascii="d")


def _choices(payload: object) -> list[str]:
    if not isinstance(payload, list) or not payload or not all(isinstance(choice, str) for choice in payload):
        raise InvalidParameterError('response_format.choice must be a list of texts such as ["yes", "no"]')
    _text("".join(payload), "response_format.choice, all texts together,")
    return payload


def _lark(payload: object) -> str:
    text = _text(payload, "response_format.grammar")
    if "::=" in _LITERALS.sub("", text):
        try:
            text = llguidance.grammar_from("gbnf", text)
        except Exception as error:  # the converter raises whatever its parser trips over
            raise InvalidParameterError(f"response_format.grammar is not valid GBNF: {error}") from error
    outside = _LITERALS.sub("", text)
    if "<" in outside:
        raise InvalidParameterError("response_format.grammar names a special token (<…>), which no answer shows")
    together = outside.count("&") + outside.count("~")
    if together > MAX_INTERSECTIONS:
        raise InvalidParameterError(
            f"response_format.grammar uses & and ~ {together} times; at most {MAX_INTERSECTIONS} are allowed"
        )
    return text


def _exact(lark: str) -> str:
    return lark + EXACT


def _patterns_together(schema: object) -> int:
    """How many patterns could meet in one place: all of them where schemas are combined, else none."""
    nodes = list(_nodes(schema))
    patterns = sum(1 for node in nodes for key in ("pattern", "format") if isinstance(node.get(key), str))
    combined = any(
        "allOf" in node or ("pattern" in node and not node.keys().isdisjoint(("$ref", "anyOf", "oneOf")))
        for node in nodes
    )
    return patterns if combined else 0


def _nodes(value: object) -> Iterator[Mapping[str, Any]]:
    """Every object of a JSON value, without recursion."""
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if isinstance(current, dict):
            yield current
            waiting.extend(current.values())
        elif isinstance(current, list):
            waiting.extend(current)
