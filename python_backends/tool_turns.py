"""Tool calls and their results in a conversation → turns that Gemma's chat template takes.

The template knows user and assistant turns that alternate, and a system text that it puts in front of the first user
turn. So the functions go behind the system text (Google's guide has them in front of the question), earlier calls
become what the model itself wrote, and the results of a call become the user turn that follows it, together with what
the user says next.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from python_backends.decoder.tools import NAME, render_calls, render_result
from python_backends.errors import InvalidMessagesError, InvalidParameterError

Message = dict[str, Any]

_CONTROL = re.compile(
    r"<(?=(?:start_of_turn|end_of_turn|start_of_image|end_of_image|image_soft_token|bos|eos|pad|unk|mask)>)"
)


def plain(text: str) -> str:
    """Without control tokens: what a function returns must neither end its turn nor take a picture's place."""
    return _CONTROL.sub("< ", text)


def read_calls(value: object, text: str, where: str) -> Message:
    """An assistant message with OpenAI's ``tool_calls``; ``text`` is what it says beside them.

    Raises:
        InvalidMessagesError: not OpenAI's form, an id twice, or arguments that are not a JSON object.
    """
    if not isinstance(value, list):
        raise InvalidMessagesError(f"{where}.tool_calls must be a list")
    ids: dict[str, str] = {}
    calls = []
    for number, entry in enumerate(value):
        call_id, name, arguments = _call(entry, f"{where}.tool_calls[{number}]")
        if call_id in ids:
            raise InvalidMessagesError(f"{where}.tool_calls has two calls of the id {call_id!r}")
        ids[call_id] = name
        calls.append((name, arguments))
    try:
        written = plain(render_calls(calls))
    except InvalidParameterError as error:
        raise InvalidMessagesError(f"{where}: {error.message}") from error
    return {"role": "assistant", "content": f"{text}\n{written}" if text.strip() else written, "calls": ids}


def read_result(value: Mapping[str, Any], text: str, where: str) -> Message:
    """A message of the role ``tool``.

    Raises:
        InvalidMessagesError: it does not name its call.
    """
    call_id = value.get("tool_call_id")
    if not isinstance(call_id, str):
        raise InvalidMessagesError(f"{where}: a tool message needs the tool_call_id of the call that it answers")
    return {"role": "tool", "content": plain(text), "call_id": call_id}


def as_turns(messages: Sequence[Message], functions: str) -> list[Message]:
    """Messages with system, user and assistant turns only; ``functions`` describes the tools, empty for none.

    Raises:
        InvalidMessagesError: a call without its result, or a result without its call.
    """
    turns = _without_results(messages)
    if not functions:
        return turns
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": functions}, *turns]
    text = turns[0]["content"]
    return [{"role": "system", "content": f"{text}\n\n{functions}" if text.strip() else functions}, *turns[1:]]


def _without_results(messages: Sequence[Message]) -> list[Message]:
    turns: list[Message] = []
    results: list[str] = []
    unanswered: dict[str, str] = {}
    for number, message in enumerate(messages):
        if message["role"] == "tool":
            results.append(_result(message, unanswered, f"messages[{number}]"))
            continue
        _refuse_unanswered(unanswered)
        if results:
            is_user = message["role"] == "user"
            turns.append(_user_turn(results, message["content"] if is_user else ""))
            results = []
            if is_user:
                continue
        turns.append(message)
        unanswered = dict(message.get("calls", {}))
    _refuse_unanswered(unanswered)
    return [*turns, _user_turn(results, "")] if results else turns


def _result(message: Message, unanswered: dict[str, str], where: str) -> str:
    name = unanswered.pop(message["call_id"], None)
    if name is None:
        raise InvalidMessagesError(
            f"{where} answers the call {message['call_id']!r}, which the assistant message before it did not make or "
            "which has its answer"
        )
    return render_result(name, message["content"])


def _refuse_unanswered(calls: Mapping[str, str]) -> None:
    for call_id, name in calls.items():
        raise InvalidMessagesError(
            f"the call {call_id!r} of {name} has no result; add a tool message with its tool_call_id behind it"
        )


def _user_turn(results: Sequence[str], content: str | list[dict[str, Any]]) -> Message:
    """Results and what the user says next. The template trims each part and puts nothing between two."""
    text = "\n".join(results)
    if isinstance(content, str):
        return {"role": "user", "content": _paragraphs(text, content)}
    if content and content[0]["type"] == "text":
        content = [{"type": "text", "text": _paragraphs(text, content[0]["text"])}, *content[1:]]
        return {"role": "user", "content": content}
    return {"role": "user", "content": [{"type": "text", "text": text}, *content]}


def _paragraphs(first: str, second: str) -> str:
    return f"{first}\n\n{second.strip()}" if second.strip() else first


def _call(value: object, where: str) -> tuple[str, str, str]:
    """(id, name, arguments as JSON text)."""
    entry = value if isinstance(value, dict) else {}
    function = entry.get("function")
    call_id, name, arguments = entry.get("id"), None, None
    if isinstance(function, dict):
        name, arguments = function.get("name"), function.get("arguments", "{}")
    if not isinstance(call_id, str) or not isinstance(arguments, str):
        raise InvalidMessagesError(
            f'{where} must be {{"id": …, "type": "function", "function": {{"name": …, "arguments": JSON as text}}}}'
        )
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidMessagesError(f"{where}.function.name must be 1 to 64 letters, digits, _ or -, not {name!r}")
    return call_id, name, arguments if arguments.strip() else "{}"
