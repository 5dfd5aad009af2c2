"""Tool calls in streamed text: found in every form that Gemma writes, whole, and text left as it was."""

import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.decoder.tool_calls import ToolCallParser
from python_backends.decoder.tools import Tool, render_calls

TOOLS = [
    Tool("get_weather", "", {"type": "object", "properties": {"city": {}, "days": {}}}),
    Tool("now", "", {"type": "object"}),
    Tool("e-mail_2", "", {"type": "object", "properties": {"to": {}, "body": {}}}),
]
Calls = list[tuple[str, Any]]


def parse(pieces: list[str]) -> tuple[str, Calls, str]:
    parser = ToolCallParser(TOOLS)
    results = [parser.add(piece) for piece in pieces] + [parser.finish()]
    calls = [call for result in results for call in result.calls]
    assert len({call.id for call in calls}) == len(calls)
    text = "".join(result.text for result in results)
    return text, [(call.name, json.loads(call.arguments)) for call in calls], parser.unfinished


PARIS = ("get_weather", {"city": "Paris", "days": 3})
NOW = ("now", {})
CALLS: dict[str, tuple[str, str, Calls]] = {
    "json": ('{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}', "", [PARIS]),
    "json with arguments": ('{"name": "now", "arguments": {}}', "", [NOW]),
    "json in another order": ('{"parameters": {"city": "Paris", "days": 3}, "name": "get_weather"}', "", [PARIS]),
    "json list": ('[{"name": "now", "parameters": {}}, {"name": "now", "parameters": {}}]', "", [NOW, NOW]),
    "json in a fence": ('```json\n{"name": "now", "parameters": {}}\n```', "", [NOW]),
    "json lines": ('{"name": "now"}\n{"name": "now"}\n', "", [NOW, NOW]),
    "pythonic": ('[get_weather(city="Paris", days=3), now()]', "", [PARIS, NOW]),
    "pythonic in a fence": ("```tool_code\n[now()]\n```", "", [NOW]),
    "bare in a fence": ('```tool_code\nget_weather("Paris", days=3)\nnow()\n```', "", [PARIS, NOW]),
    "bare in a plain fence": ("```\nnow()\n```\n", "", [NOW]),
    "bare at the start": ("\n now( )", "", [NOW]),
    "positional": ("[get_weather('Paris', 3,)]", "", [PARIS]),
    "text before": ("I will look.\n```json\n[now()]\n```", "I will look.\n", [NOW]),
    "text around": ("Well, [now()] it is", "Well, it is", [NOW]),
    "python values": (
        "[get_weather(city=None, days=[True, False, -1.5e3, {'a': (\"x\")}])]",
        "[get_weather(city=None, days=[True, False, -1.5e3, {'a': (\"x\")}])]",
        [],
    ),
    "nested values": (
        "[get_weather(city=None, days=[True, false, -1.5, {'a': \"x\", 'b': []}])]",
        "",
        [("get_weather", {"city": None, "days": [True, False, -1.5, {"a": "x", "b": []}]})],
    ),
    "escapes": (
        r"""[e-mail_2(to='it\'s "me"', body="a\nb\\ \u00e9\ud83d\ude00 \d ] ) }")]""",
        "",
        [("e-mail_2", {"to": 'it\'s "me"', "body": "a\nb\\ é😀 \\d ] ) }"})],
    ),
    "half a character": (r'[now(a="\ud83d")]', "", [("now", {"a": "\ufffd"})]),
}

NO_CALLS = {
    "text": "Hello, how are you?",
    "blanks": " \n\n ",
    "list": "A list: [1, 2, [3]] and [x](http://example.com)",
    "other function": "[get_time(zone=1)]",
    "object": '{"name": "Alice", "parameters": {}}',
    "object without name": '{"city": "Paris"}',
    "code": "Run\n```python\nprint(now)\n```\nand `x` or ``y``.",
    "name as a word": "now we go (soon)",
    "part of a name": "get_wea",
    "syntax": "[get_weather(city=Paris)]",
    "too many arguments": '[get_weather("a", 1, 2)]',
    "infinite": "[now(a=1e999)]",
    "deep": "[now(a=" + "[" * 100 + "]" * 100 + ")]",
    "open list": "[get_wea",
    "open object": '{"name": "get_w',
    "open fence": "```js",
    "fences only": "```\n```\n```",
    "empty list": "[]",
}


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_found_in_every_form_however_the_text_is_cut(name: str, size: int) -> None:
    answer, text, calls = CALLS[name]
    pieces = [answer[start : start + size] for start in range(0, len(answer), size)]
    assert parse(pieces) == (text, calls, "")


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("name", NO_CALLS)
def test_text_without_calls_stays_as_it_was(name: str, size: int) -> None:
    answer = NO_CALLS[name]
    pieces = [answer[start : start + size] for start in range(0, len(answer), size)]
    assert parse(pieces) == (answer, [], "")


def test_nothing_of_a_call_is_given_out_before_the_call() -> None:
    parser = ToolCallParser(TOOLS)
    answer = 'Let me see. [get_weather(city="Paris (F)", days=3), now()]'
    given = [parser.add(char) for char in answer]
    assert "".join(result.text for result in given) == "Let me see. "
    assert [bool(result.calls) for result in given] == [False] * (len(answer) - 1) + [True]


def test_plain_text_is_not_delayed() -> None:
    parser = ToolCallParser(TOOLS)
    assert [parser.add(word).text for word in ("I", " think", " so", ".")] == ["I", " think", " so", "."]


@pytest.mark.parametrize("answer", ['[get_weather(city="Par', '{"name": "now", "parameters": {', "```json\n[now()"])
def test_a_call_cut_off_is_not_shown_as_text(answer: str) -> None:
    assert parse(["Well: ", *answer]) == ("Well: ", [], answer)


def test_calls_have_openais_form() -> None:
    (call,) = ToolCallParser(TOOLS).add('[get_weather(city="北京")]').calls
    form = call.as_json()
    assert form["id"].startswith("call_")
    assert form["type"] == "function"
    assert form["function"] == {"name": "get_weather", "arguments": '{"city": "北京"}'}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([tool.name for tool in TOOLS])
IDENTIFIERS = st.text(string.ascii_letters + "_", min_size=1, max_size=8)
CUTS = st.lists(st.integers(1, 9), min_size=1, max_size=10)


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, place = [], 0
    while text:
        size = sizes[place % len(sizes)]
        pieces.append(text[:size])
        text, place = text[size:], place + 1
    return pieces


@given(
    calls=st.lists(st.tuples(NAMES, st.dictionaries(st.text(), JSON, max_size=3)), min_size=1, max_size=3), sizes=CUTS
)
def test_what_the_prompt_shows_as_a_call_is_read_back(calls: Calls, sizes: list[int]) -> None:
    written = render_calls([(name, json.dumps(arguments)) for name, arguments in calls])
    assert parse(cut(written, sizes)) == ("", calls, "")


@given(
    calls=st.lists(st.tuples(NAMES, st.dictionaries(IDENTIFIERS, JSON, max_size=3)), min_size=1, max_size=3), sizes=CUTS
)
def test_python_literals_are_read_back(calls: Calls, sizes: list[int]) -> None:
    written = ", ".join(f"{name}({', '.join(f'{key}={value!r}' for key, value in a.items())})" for name, a in calls)
    assert parse(cut(f"[{written}]", sizes)) == ("", calls, "")


@given(text=st.text("`[]{}()\"'\\,;: \nnow=1js"), sizes=CUTS)
def test_however_it_is_cut_the_same_comes_out(text: str, sizes: list[int]) -> None:
    whole, pieces = parse([text]), parse(cut(text, sizes))
    assert whole == pieces
    if not whole[1]:
        assert whole[0] + whole[2] == text
