"""Every response format that cannot work is refused in words, quickly and without harm to the server."""

import time
from typing import Any

import pytest

from python_backends.decoder import grammar
from python_backends.decoder.grammar import GrammarCompiler
from python_backends.decoder.response_format import MAX_BYTES, parse
from python_backends.errors import InvalidParameterError, OverloadedError
from tests.python_backends.decoder.gemma_style import Setup, small_setup


@pytest.fixture(scope="module")
def small() -> Setup:
    return small_setup()


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": value}}


def lark(text: str) -> dict[str, Any]:
    return {"type": "grammar", "grammar": text}


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


def pattern(number: int) -> str:
    return f"^(a|b)*a(a|b){{{number}}}$"


MALFORMED = {
    "not an object": ([], "must be a JSON object"),
    "no type": ({}, "type is None; use one of text, json_object"),
    "unknown type": ({"type": "xml"}, "type is 'xml'"),
    "unhashable type": ({"type": []}, r"type is \[\]"),
    "unknown key": ({"type": "json_object", "schema": {}}, "has no key 'schema'"),
    "missing payload": ({"type": "regex"}, "needs the key 'regex'"),
    "no schema": ({"type": "json_schema", "json_schema": {"name": "x"}}, "needs the key 'schema'"),
    "schema in the wrong place": ({"type": "json_schema", "json_schema": {"type": "object"}}, "no key 'type'"),
    "schema not an object": (schema(True), "must be a JSON object, not true"),
    "options not an object": (schema({"x-guidance": 1}), "x-guidance must be a JSON object"),
    "bad JSON type": (schema({"type": "strin"}), "Invalid type: strin"),
    "unknown reference": (schema({"$ref": "#/nope"}), "'/nope' does not exist"),
    "reference elsewhere": (schema({"$ref": "http://example.com/x.json"}), "does not fetch"),
    "reference to itself": (schema({"$ref": "#"}), "no answer can satisfy it"),
    "contradiction": (schema({"type": "string", "minLength": 5, "maxLength": 3}), "minLength"),
    "keyword not enforced": (schema({"type": "array", "uniqueItems": True}), "uniqueItems.*leave them out"),
    "too deep": (schema(nested(300)), "recursion limit"),
    "too large": (schema({"enum": [f"value {number}" for number in range(6000)]}), f"at most {MAX_BYTES}"),
    "patterns together": (schema({"allOf": [{"pattern": pattern(n)} for n in range(30)]}), "30 patterns in all"),
    "patterns by reference": (
        schema({"$defs": {f"d{n}": {"pattern": pattern(n), "$ref": f"#/$defs/d{n + 1}"} for n in range(20)}}),
        "20 patterns in all",
    ),
    "pattern properties": (schema({"patternProperties": {f"^a{n}_": {} for n in range(65)}}), "65 patternProperties"),
    "empty regex": ({"type": "regex", "regex": ""}, "not empty"),
    "open group": ({"type": "regex", "regex": "(a"}, "unclosed group"),
    "back reference": ({"type": "regex", "regex": r"(a)\1"}, "backreferences are not supported"),
    "look-ahead": ({"type": "regex", "regex": "(?=a)b"}, "look-around"),
    "regex that matches nothing": ({"type": "regex", "regex": r"[^\s\S]"}, "no answer can satisfy it"),
    "deep groups": ({"type": "regex", "regex": "(" * 3000 + "a" + ")" * 3000}, "invalid regex"),
    "half a character": ({"type": "regex", "regex": "\ud83d"}, "surrogate"),
    "no choices": ({"type": "choice", "choice": []}, "list of texts"),
    "choice of numbers": ({"type": "choice", "choice": [1, 2]}, "list of texts"),
    "only an empty choice": ({"type": "choice", "choice": [""]}, "not empty"),
    "no start rule": (lark('x: "a"'), "start"),
    "unknown rule": (lark("start: foo"), 'unknown name: "foo"'),
    "endless recursion": (lark('start: start "a"'), "no answer can satisfy it"),
    "deep brackets": (lark("start: " + "(" * 3000 + '"a"' + ")" * 3000), "too deeply nested"),
    "special token": (lark('start: <start_of_turn> "a"'), "special token"),
    "token ids": (lark("start: <[0-10]>"), "special token"),
    "many intersections": (lark("start: T\nT: " + " & ".join(f"/{pattern(n)}/" for n in range(12))), "11 times"),
    "hidden intersections": (lark('start: T\nT: "/" ' + "& /a/ " * 9 + '"/"'), "9 times"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_format_that_cannot_work_is_refused_with_the_reason(small: Setup, name: str) -> None:
    response_format, reason = MALFORMED[name]
    started = time.monotonic()
    with pytest.raises(InvalidParameterError, match=f"(?s){reason}") as refusal:
        small.compiler.compile(response_format)
    assert time.monotonic() - started < 5
    assert len(refusal.value.message) < 700


def test_text_that_is_not_json_is_refused() -> None:
    assert parse('{"type": "text"}') == {"type": "text"}
    for text in ("{", "[" * 100_000, ""):
        with pytest.raises(InvalidParameterError, match="not valid JSON"):
            parse(text)


def test_free_text_has_no_grammar(small: Setup) -> None:
    assert small.compiler.compile({"type": "text"}) is None


DEEP = {
    "rules": lark("start: r0\n" + "\n".join(f"r{n}:r{n + 1}" for n in range(5000)) + '\nr5000: "a"'),
    "terminals": lark("start: T0\n" + "\n".join(f'T{n}: "a" T{n + 1}' for n in range(2500)) + '\nT2500: "a"'),
    "references": schema(
        {
            "$defs": {f"n{n}": {"$ref": f"#/$defs/n{n + 1}"} for n in range(1800)} | {"n1800": {"type": "null"}},
            "$ref": "#/$defs/n0",
        }
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_long_chains_do_not_exhaust_the_stack(small: Setup, name: str) -> None:
    matcher = small.grammar(DEEP[name]).matcher()  # on the 8 MiB of an ordinary thread the process would die
    token = min(small.allowed(matcher))
    matcher.accept(token)
    assert small.allowed(matcher)


def test_white_space_is_bounded_so_that_an_answer_goes_on(small: Setup) -> None:
    matcher = small.grammar({"type": "json_object"}).matcher()
    for token in small.encode("("):  # not JSON
        assert token not in small.allowed(matcher)
    space = small.tokenizer.token_to_id("<0x20>")
    matcher.accept(small.tokenizer.token_to_id("<0x7B>"))
    matcher.accept(space)
    assert space not in small.allowed(matcher)


def test_a_compilation_over_its_time_is_refused_and_the_next_ones_wait_for_a_place(
    small: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 0.05)
    compiler = GrammarCompiler(small.tokens)
    slow = GrammarCompiler._build

    def build(self: GrammarCompiler, text: str) -> Any:
        time.sleep(0.4)
        return slow(self, text)

    monkeypatch.setattr(GrammarCompiler, "_build", build)
    for _ in range(grammar.MAX_COMPILATIONS):
        with pytest.raises(InvalidParameterError, match="longer than"):
            compiler.compile({"type": "json_object"})
    with pytest.raises(OverloadedError, match="try again"):
        compiler.compile({"type": "json_object"})
    monkeypatch.setattr(GrammarCompiler, "_build", slow)
    time.sleep(0.6)
    monkeypatch.setattr(grammar, "COMPILE_SECONDS", 10.0)
    assert compiler.compile({"type": "json_object"}) is not None
