"""OpenAI `tools` for Gemma 3: checked, written into the prompt, and as a grammar where a call is demanded.

Gemma 3 has no tokens for tools; everything is prompt text. Google's guide "Function calling with Gemma" gives the
sentences used here and two forms for the answer, ``[name(argument=value, …), …]`` and ``{"name": …, "parameters":
{…}}``. The prompt asks for the second, which carries types exactly and which a JSON schema can enforce; `tool_calls`
reads both. Results go back in a ```` ```tool_output ```` fence (Google's Gemma examples).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from python_backends.errors import InvalidParameterError

MAX_TOOLS = 128
MAX_DEPTH = 64
"""Levels of a function's JSON schema. Each is indented in the prompt, so the text grows by the square of the depth."""
MODES = ("none", "auto", "required")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FUNCTION_KEYS = ("name", "description", "parameters", "strict")

_INTRODUCTION = """\
You have access to functions. If you decide to invoke any of the function(s), you MUST put it in the format of
{"name": function name, "parameters": dictionary of argument name and its value}
To invoke several functions, put them into a list: [{"name": …, "parameters": …}, {"name": …, "parameters": …}]

You SHOULD NOT include any other text in the response if you call a function"""


@dataclass(frozen=True)
class Tool:
    """One function of the request's `tools`."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments; an object."""

    @property
    def argument_names(self) -> tuple[str, ...]:
        """In the order of the schema, which is what positional arguments of a pythonic call mean."""
        return tuple(self.parameters.get("properties", {}))


@dataclass(frozen=True)
class ToolChoice:
    """Whether the model may, must or must not call, and which function (any where `name` is None)."""

    mode: str
    """none, auto or required."""
    name: str | None = None


def read_request(tools: str, tool_choice: str) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The two inputs of a request as they arrive, JSON texts; empty where absent. A mode may stand without its quotes.

    Raises:
        InvalidParameterError: see `read_tools` and `read_tool_choice`; a choice without tools.
    """
    found = read_tools(_json("tools", tools)) if tools else ()
    if tool_choice and not found:
        raise InvalidParameterError("tool_choice needs tools")
    if not tool_choice:
        return found, ToolChoice("auto")
    value = tool_choice if tool_choice in MODES else _json("tool_choice", tool_choice)
    return found, read_tool_choice(value, found)


def read_tools(value: object) -> tuple[Tool, ...]:
    """The `tools` list of a request (parsed JSON).

    Raises:
        InvalidParameterError: not OpenAI's form, two functions of one name, or a schema that cannot be used.
    """
    if not isinstance(value, list) or not value:
        raise InvalidParameterError('tools must be a list such as [{"type": "function", "function": {"name": "f"}}]')
    if len(value) > MAX_TOOLS:
        raise InvalidParameterError(f"tools has {len(value)} entries; at most {MAX_TOOLS} are allowed")
    tools = tuple(_tool(entry, f"tools[{number}]") for number, entry in enumerate(value))
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidParameterError(f"tools has two functions named {twice!r}")
    return tools


def read_tool_choice(value: object, tools: Sequence[Tool]) -> ToolChoice:
    """The `tool_choice` of a request; None is auto.

    Raises:
        InvalidParameterError: neither none, auto, required nor a function among ``tools``.
    """
    if value is None or value in MODES:
        return ToolChoice("auto" if value is None else str(value))
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidParameterError(
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}'
        )
    if all(tool.name != name for tool in tools):
        raise InvalidParameterError(f"tool_choice names {name!r}; tools has {', '.join(tool.name for tool in tools)}")
    return ToolChoice("required", name)


def render_tools(tools: Sequence[Tool], choice: ToolChoice) -> str:
    """The text that goes in front of the first user turn (Gemma has no system turn); empty where none may be called."""
    if choice.mode == "none":
        return ""
    demand = ""
    if choice.name is not None:
        demand = f"\nYou MUST call the function {choice.name} now"
    elif choice.mode == "required":
        demand = "\nYou MUST call at least one function now"
    functions = [{"name": tool.name, "description": tool.description, "parameters": tool.parameters} for tool in tools]
    return f"{_INTRODUCTION}{demand}\n{json.dumps(functions, indent=2, ensure_ascii=False)}"


def render_calls(calls: Sequence[tuple[str, str]]) -> str:
    """Earlier calls (name, arguments as JSON text) as the model's own turn would have had them.

    Raises:
        InvalidParameterError: arguments that are not a JSON object.
    """
    written = [{"name": name, "parameters": _arguments(name, arguments)} for name, arguments in calls]
    try:
        return json.dumps(written[0] if len(written) == 1 else written, ensure_ascii=False)
    except RecursionError as error:
        raise InvalidParameterError("the arguments of a call are nested too deeply") from error


def render_result(name: str, content: str) -> str:
    """The answer of a function for the user turn that follows a call."""
    return f"```tool_output\n{name}: {content}\n```"


def call_grammar(tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool = True) -> str | None:
    """A grammar for `GrammarCompiler.compile_lark` whose every answer is one call or, if ``parallel``, a list of calls.

    None where the model is free not to call. Arguments follow each function's schema.

    Raises:
        InvalidParameterError: a schema over the limits of `response_format`.
    """
    if choice.mode != "required":
        return None
    # The tokenizer stage renders tools too, and needs no grammar engine for it (15 MB, 0.1 s).
    from python_backends.decoder.response_format import EXACT, json_rule, lark_string

    chosen = [tool for tool in tools if choice.name in (None, tool.name)]
    rules = [
        f'call_{number}: {lark_string(_call_start(tool.name))} {json_rule(_closed(tool.parameters), tool.name)} "}}"'
        for number, tool in enumerate(chosen)
    ]
    # A named function is called once: OpenAI's meaning.
    several = ' | "[" call (", " call)* "]"' if parallel and choice.name is None else ""
    calls = " | ".join(f"call_{number}" for number in range(len(chosen)))
    return "\n".join([f"start: call{several}", f"call: {calls}", *rules]) + EXACT


def _closed(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without arguments that the function does not name, unless its schema speaks of them or is put together."""
    if parameters.keys().isdisjoint(("additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf")):
        return {**parameters, "additionalProperties": False}
    return parameters


def _call_start(name: str) -> str:
    return f'{{"name": {json.dumps(name)}, "parameters": '


def _tool(value: object, where: str) -> Tool:
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict):
        raise InvalidParameterError(f'{where} must be {{"type": "function", "function": {{"name": …}}}}')
    unknown = next((key for key in function if key not in _FUNCTION_KEYS), None)
    if unknown is not None:
        raise InvalidParameterError(f"{where}.function has no key {unknown!r}; use {', '.join(_FUNCTION_KEYS)}")
    name, description = function.get("name"), function.get("description") or ""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidParameterError(f"{where}.function.name must be 1 to 64 letters, digits, _ or -, not {name!r}")
    if not isinstance(description, str):
        raise InvalidParameterError(f"{where}.function.description must be a text")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise InvalidParameterError(f"{where}.function.parameters must be a JSON schema of type object")
    if not isinstance(parameters.get("properties", {}), dict):
        raise InvalidParameterError(f"{where}.function.parameters.properties must be a JSON object")
    if _deeper_than(parameters, MAX_DEPTH):
        raise InvalidParameterError(f"{where}.function.parameters is nested more than {MAX_DEPTH} levels deep")
    return Tool(name, description, {"type": "object", **parameters})


def _deeper_than(value: Any, levels: int) -> bool:
    """Level by level, without recursion."""
    level = [value]
    for _ in range(levels):
        inner = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [child for children in inner for child in children]
    return any(isinstance(node, dict | list) for node in level)


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidParameterError(f"{name} is not valid JSON: {error}") from error


def _arguments(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise InvalidParameterError(f"the arguments of the call of {name!r} are not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidParameterError(f"the arguments of the call of {name!r} must be a JSON object")
    return value
