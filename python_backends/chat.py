"""What the user sends → messages as the chat template takes them, and the pictures in prompt order.

Three forms arrive: `text_input` (one user turn), `text_input` that already holds turns (taken as it is), and
`messages`, the OpenAI list. Pictures come inside messages (``image_url`` parts) or beside them in the `image` tensor,
whose entries fill the placeholders (``image`` parts, or ``<start_of_image>`` in a text) in order; where there is no
placeholder they go in front of the last user turn's text. What belongs to tools is in `tool_turns`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from python_backends import tool_turns
from python_backends.errors import EmptyPromptError, ImageCountError, InvalidMessagesError, InvalidTextError

START_OF_TURN = "<start_of_turn>"
START_OF_IMAGE = "<start_of_image>"
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
}
_IMAGE_KEYS = ("image", "url", "base64")  # where transformers' own ``image`` parts keep a picture

Part = dict[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages as the chat template takes them, pictures in the order of their placeholders.

    A picture is still what the user sent: encoded bytes, base64 or a data URL.
    """

    messages: list[Message]
    images: list[bytes]


def decode_text(data: bytes) -> str:
    """UTF-8 bytes → text.

    Raises:
        InvalidTextError: not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidTextError(f"the text is not UTF-8 (byte {error.start}); send UTF-8") from error


def from_text(text: str, images: Sequence[bytes], functions: str = "") -> Conversation:
    """One user turn; ``functions`` describes the tools.

    Raises:
        EmptyPromptError: neither text nor picture.
        ImageCountError: placeholders in the text, but not as many as pictures.
    """
    return _conversation([{"role": "user", "content": text}], images, functions)


def from_messages(data: bytes, images: Sequence[bytes], functions: str = "") -> Conversation:
    """The OpenAI list as JSON; ``images`` are the entries of the `image` tensor, ``functions`` describes the tools.

    Raises:
        InvalidTextError: not UTF-8.
        InvalidMessagesError: not JSON, not a list of messages with known roles and parts, or calls of tools and their
            results that do not belong together.
        EmptyPromptError: neither text nor picture.
        ImageCountError: more or fewer images than placeholders.
    """
    try:
        values = json.loads(decode_text(data))
    except (ValueError, RecursionError) as error:
        raise InvalidMessagesError(f"messages is not valid JSON: {error}") from error
    if not isinstance(values, list) or not values:
        raise InvalidMessagesError('messages must be a list such as [{"role": "user", "content": "Hello"}]')
    return _conversation([_message(value, number) for number, value in enumerate(values)], images, functions)


def templated(text: str, images: Sequence[bytes]) -> tuple[str, list[bytes]]:
    """A prompt that already holds turns; pictures without placeholders go in front of its last user turn.

    Raises:
        ImageCountError: placeholders, but not as many as pictures, or no user turn to put them in.
    """
    if images and START_OF_IMAGE not in text:
        before, turn, after = text.rpartition(f"{START_OF_TURN}user\n")
        if not turn:
            raise ImageCountError("the prompt holds no user turn for its images; mark their places by <start_of_image>")
        text = before + turn + START_OF_IMAGE * len(images) + after
    check_placeholders(text.count(START_OF_IMAGE), len(images))
    return text, list(images)


def check_placeholders(places: int, images: int) -> None:
    """Raises ImageCountError where the two numbers differ."""
    if places != images:
        raise ImageCountError(f"the prompt has {places} image placeholder(s) for {images} image(s)")


def _message(value: Any, number: int) -> Message:
    where = f"messages[{number}]"
    if not isinstance(value, dict):
        raise InvalidMessagesError(f"{where} must be an object with role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidMessagesError(f"{where}: role {role!r} is unknown; use one of {', '.join(ROLES)}")
    kind, content, calls = ROLES[role], value.get("content"), value.get("tool_calls")
    if calls and kind != "assistant":
        raise InvalidMessagesError(f"{where}: only an assistant message has tool_calls")
    if calls and content is None:  # OpenAI's clients send null
        content = ""
    if isinstance(content, list):
        content = [_part(part, f"{where}.content[{place}]") for place, part in enumerate(content)]
    elif not isinstance(content, str):
        raise InvalidMessagesError(f"{where}: content must be a text or a list of parts")
    if calls:
        return tool_turns.read_calls(calls, _only_text(content, where, "with tool_calls"), where)
    if kind == "tool":
        return tool_turns.read_result(value, _only_text(content, where, "of a tool"), where)
    # Gemma's template reads the first part of a system message alone; the others would be lost without a word.
    return {"role": kind, "content": _only_text(content, where, "of the system") if kind == "system" else content}


def _only_text(content: str | list[Part], where: str, whose: str) -> str:
    """One text."""
    if isinstance(content, str):
        return content
    if any(part["type"] != "text" for part in content):
        raise InvalidMessagesError(f"{where}: a message {whose} holds text only")
    return "\n".join(part["text"] for part in content)


def _part(part: Any, where: str) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InvalidMessagesError(f"{where}: a text part needs its text")
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        address = part.get("image_url")
        address = address.get("url") if isinstance(address, dict) else address
        if not isinstance(address, str):
            raise InvalidMessagesError(f'{where}: an image_url part needs {{"url": "data:image/…;base64,…"}}')
        return {"type": "image", "data": address}
    if kind == "image":
        data = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
        if data is not None and not isinstance(data, str):
            raise InvalidMessagesError(f"{where}: the image must be base64 or a data URL")
        return {"type": "image"} if data is None else {"type": "image", "data": data}
    raise InvalidMessagesError(f"{where}: a part is an object of type text, image_url or image, not {kind!r}")


def _parts(messages: Sequence[Message]) -> Iterator[Part]:
    for message in messages:
        content = message["content"]
        yield from [{"type": "text", "text": content}] if isinstance(content, str) else content


def _conversation(messages: list[Message], images: Sequence[bytes], functions: str) -> Conversation:
    users = [message for message in messages if message["role"] == "user"]
    if not users:
        raise InvalidMessagesError("messages holds no user message to answer")
    places = sum(_open_places(part) for part in _parts(messages))
    if images and not places:
        content = users[-1]["content"]
        text = [{"type": "text", "text": content}] if isinstance(content, str) else content
        users[-1]["content"] = [{"type": "image"}] * len(images) + text
        places = len(images)
    check_placeholders(places, len(images))
    if not any(part["type"] == "image" or part["text"].strip() for part in _parts(messages)):
        raise EmptyPromptError("the prompt has no text and no image")
    return Conversation(_for_template(tool_turns.as_turns(messages, functions)), _in_order(messages, images))


def _open_places(part: Part) -> int:
    """How many entries of the `image` tensor a part takes."""
    if part["type"] == "text":
        return int(part["text"].count(START_OF_IMAGE))
    return int("data" not in part)


def _in_order(messages: Sequence[Message], images: Sequence[bytes]) -> list[bytes]:
    beside = iter(images)
    found: list[bytes] = []
    for part in _parts(messages):
        if "data" in part:
            found.append(part["data"].encode("utf-8", "replace"))
        else:
            found += [next(beside) for _ in range(_open_places(part))]
    return found


def _for_template(messages: Sequence[Message]) -> list[Message]:
    """Without the pictures' data: the template only looks at the parts' types."""
    return [
        {"role": message["role"], "content": content}
        if isinstance(content := message["content"], str)
        else {
            "role": message["role"],
            "content": [{"type": "image"} if part["type"] == "image" else part for part in content],
        }
        for message in messages
    ]
