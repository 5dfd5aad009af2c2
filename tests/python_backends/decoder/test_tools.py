"""Tools as OpenAI's clients send them: refused in words, or written into the prompt and into a grammar."""

import json
from typing import Any

import pytest

from python_backends.decoder.tools import (
    ToolChoice,
    call_grammar,
    read_tool_choice,
    read_tools,
    render_calls,
    render_result,
    render_tools,
)
from python_backends.errors import InvalidParameterError
from tests.python_backends.decoder.gemma_style import Setup, small_setup


def function(name: str, properties: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties or {}, **more}
    return {"type": "function", "function": {"name": name, "description": f"does {name}", "parameters": parameters}}


WEATHER = function("get_weather", {"city": {"type": "string", "maxLength": 5}}, required=["city"])
TOOLS = read_tools([WEATHER, function("now")])

MALFORMED = {
    "no list": ({}, "must be a list"),
    "empty": ([], "must be a list"),
    "too many": ([function(f"f{number}") for number in range(129)], "at most 128"),
    "no type": ([{"function": {"name": "f"}}], r"tools\[0\] must be"),
    "no function": ([WEATHER, {"type": "function"}], r"tools\[1\] must be"),
    "unknown key": ([{"type": "function", "function": {"name": "f", "params": {}}}], "no key 'params'"),
    "no name": ([{"type": "function", "function": {}}], "function.name must be"),
    "name with blanks": ([function("get weather")], "letters, digits"),
    "long name": ([function("a" * 65)], "1 to 64"),
    "description": ([{"type": "function", "function": {"name": "f", "description": 1}}], "description must be"),
    "schema of an array": (
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
        "object",
    ),
    "properties": ([{"type": "function", "function": {"name": "f", "parameters": {"properties": []}}}], "properties"),
    "twice": ([function("f"), function("g"), function("f")], "two functions named 'f'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_tools_that_cannot_be_used_are_refused_with_the_reason(name: str) -> None:
    value, reason = MALFORMED[name]
    with pytest.raises(InvalidParameterError, match=reason):
        read_tools(value)


def test_a_tool_choice_is_a_mode_or_a_known_function() -> None:
    assert read_tool_choice(None, TOOLS) == ToolChoice("auto")
    assert read_tool_choice("none", TOOLS) == ToolChoice("none")
    named = {"type": "function", "function": {"name": "now"}}
    assert read_tool_choice(named, TOOLS) == ToolChoice("required", "now")
    for wrong, reason in (
        ("any", "must be"),
        (3, "must be"),
        ({"type": "function"}, "must be"),
        ({"type": "function", "function": {"name": "later"}}, "tools has get_weather, now"),
    ):
        with pytest.raises(InvalidParameterError, match=reason):
            read_tool_choice(wrong, TOOLS)


def test_the_prompt_holds_googles_sentences_and_every_schema() -> None:
    text = render_tools(TOOLS, ToolChoice("auto"))
    assert text.startswith("You have access to functions. If you decide to invoke any of the function(s), you MUST put")
    assert '{"name": function name, "parameters": dictionary of argument name and its value}' in text
    assert "You SHOULD NOT include any other text in the response if you call a function" in text
    listed = json.loads(text[text.index("\n[\n") :])
    assert [entry["parameters"] for entry in listed] == [tool.parameters for tool in TOOLS]
    assert "MUST call the function now " in render_tools(TOOLS, ToolChoice("required", "now"))
    assert "MUST call at least one" in render_tools(TOOLS, ToolChoice("required"))
    assert render_tools(TOOLS, ToolChoice("none")) == ""


def test_earlier_calls_and_results_are_written_as_the_prompt_asks_for_them() -> None:
    one = ("get_weather", '{"city": "北京"}')
    assert render_calls([one]) == '{"name": "get_weather", "parameters": {"city": "北京"}}'
    assert json.loads(render_calls([one, ("now", "{}")]))[1] == {"name": "now", "parameters": {}}
    assert render_result("now", "12:00") == "```tool_output\nnow: 12:00\n```"
    for wrong in ("[1]", "{", ""):
        with pytest.raises(InvalidParameterError, match="'now'"):
            render_calls([("now", wrong)])


@pytest.fixture(scope="module")
def small() -> Setup:
    return small_setup()


def accepts(small: Setup, choice: ToolChoice, text: str, *, parallel: bool = True) -> bool:
    grammar = call_grammar(TOOLS, choice, parallel=parallel)
    assert grammar is not None
    matcher = small.compiler.compile_lark(grammar).matcher()
    for token in small.encode(text):
        if token not in small.allowed(matcher):
            return False
        matcher.accept(token)
    return matcher.is_complete


def test_a_demanded_call_names_a_function_and_fits_its_schema(small: Setup) -> None:
    weather, now = '{"name": "get_weather", "parameters": {"city": "Rom"}}', '{"name": "now", "parameters": {}}'
    required, named = ToolChoice("required"), ToolChoice("required", "now")
    assert accepts(small, required, weather)
    assert accepts(small, required, now)
    assert accepts(small, required, f"[{weather}, {now}]")
    assert not accepts(small, required, f"[{weather}, {now}]", parallel=False)
    assert accepts(small, named, now)
    for wrong in (weather, f"[{now}]", f"{now} and", "Hello"):
        assert not accepts(small, named, wrong)
    for wrong in (
        "[]",
        weather.replace("Rom", "Palermo"),
        now.replace("{}", '{"zone": 1}'),
        now.replace("now", "later"),
    ):
        assert not accepts(small, required, wrong)
    assert call_grammar(TOOLS, ToolChoice("auto")) is None


def test_references_of_two_functions_do_not_mix(small: Setup) -> None:
    tools = read_tools(
        [
            function("first", {"x": {"$ref": "#/$defs/x"}}, required=["x"], **{"$defs": {"x": {"type": "integer"}}}),
            function("other", {"x": {"$ref": "#/$defs/x"}}, required=["x"], **{"$defs": {"x": {"type": "null"}}}),
        ]
    )
    grammar = call_grammar(tools, ToolChoice("required"))
    assert grammar is not None
    for text, fits in (
        ('{"name": "other", "parameters": {"x": null}}', True),
        ('{"name": "other", "parameters": {"x": 1}}', False),
    ):
        matcher = small.compiler.compile_lark(grammar).matcher()
        tokens = small.encode(text)
        taken = 0
        for token in tokens:
            if token not in small.allowed(matcher):
                break
            matcher.accept(token)
            taken += 1
        assert (taken == len(tokens)) == fits
