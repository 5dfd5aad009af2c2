"""Every kind of bad input is refused by name, and the server answers the next request as if nothing had been."""

from __future__ import annotations

import io
import json
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from client import Client
from client.answer import from_triton
from client.server import Server
from python_backends.errors import (
    ContextLengthError,
    EmptyPromptError,
    ImageCountError,
    ImageTooLargeError,
    InvalidImageError,
    InvalidMessagesError,
    InvalidParameterError,
    InvalidTextError,
    WiCoreError,
)
from tests.server.stock import curl, grpc_stream


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def huge_png() -> bytes:
    """A PNG of 30,000 × 30,000 by its header; the pixels would be 2.7 GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def user(content: Any) -> str:
    return json.dumps([{"role": "user", "content": content}])


GOOD = png(40, 30)
TWO_PLACEHOLDERS = user([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Hi"}])
ONE_PLACEHOLDER = user([{"type": "image"}, {"type": "text", "text": "Hi"}])

BAD: list[tuple[str, dict[str, Any], type[WiCoreError]]] = [
    ("not an image", {"text_input": "Hi", "image": [b"GIF? no"]}, InvalidImageError),
    ("a truncated image", {"text_input": "Hi", "image": [png(300, 300)[:-60]]}, InvalidImageError),
    ("a huge image", {"text_input": "Hi", "image": [huge_png()]}, ImageTooLargeError),
    ("an empty image", {"text_input": "Hi", "image": [b""]}, InvalidImageError),
    ("fewer placeholders than images", {"messages": ONE_PLACEHOLDER, "image": [GOOD, GOOD]}, ImageCountError),
    ("more placeholders than images", {"messages": TWO_PLACEHOLDERS, "image": [GOOD]}, ImageCountError),
    ("an unknown role", {"messages": json.dumps([{"role": "alien", "content": "Hi"}])}, InvalidMessagesError),
    ("malformed JSON", {"messages": '[{"role": "user", '}, InvalidMessagesError),
    ("JSON that is no conversation", {"messages": "42"}, InvalidMessagesError),
    ("an empty prompt", {"text_input": ""}, EmptyPromptError),
    ("an empty conversation", {"messages": "[]"}, InvalidMessagesError),
    ("invalid UTF-8", {"text_input": b"\xff\xfe\xfd"}, InvalidTextError),
    ("a prompt beyond the context", {"text_input": "circle " * 20_000}, ContextLengthError),
    ("a negative temperature", {"text_input": "Hi", "temperature": -1.0}, InvalidParameterError),
    ("an infinite temperature", {"text_input": "Hi", "temperature": float("inf")}, InvalidParameterError),
    ("a temperature that is no number", {"text_input": "Hi", "temperature": float("nan")}, InvalidParameterError),
    ("a huge temperature", {"text_input": "Hi", "temperature": 1e30}, InvalidParameterError),
    ("a top_p above one", {"text_input": "Hi", "top_p": 1.5}, InvalidParameterError),
    ("a negative top_k", {"text_input": "Hi", "top_k": -5}, InvalidParameterError),
    ("no tokens", {"text_input": "Hi", "max_tokens": 0}, InvalidParameterError),
    ("negative tokens", {"text_input": "Hi", "max_tokens": -7}, InvalidParameterError),
    ("a stop token outside the vocabulary", {"text_input": "Hi", "stop_token_ids": [2**31 - 1]}, InvalidParameterError),
    ("an unknown command", {"text_input": "Hi", "command": "reboot"}, InvalidParameterError),
]


def refusal(address: str, **inputs: Any) -> WiCoreError:
    _, error = grpc_stream(address, **inputs)
    assert error
    assert "Traceback" not in error
    assert "/python_backends/" not in error
    return from_triton(error)


@pytest.mark.parametrize(("inputs", "kind"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_is_refused_by_name_and_the_server_goes_on(
    server: Server, client: Client, inputs: dict[str, Any], kind: type[WiCoreError]
) -> None:
    error = refusal(server.addresses.grpc, **inputs)
    assert type(error) is kind
    assert error.message
    answer = client.generate("Describe the picture.", images=[GOOD], max_tokens=3, ignore_eos=True)
    assert len(answer.token_ids) == 3


def test_a_huge_picture_is_refused_at_once(server: Server) -> None:
    picture = huge_png()
    begin = time.monotonic()
    refusal(server.addresses.grpc, text_input="Hi", image=[picture])
    assert time.monotonic() - begin < 2


def test_a_picture_of_one_pixel_is_answered(client: Client) -> None:
    assert client.generate("Hi", images=[png(1, 1)], max_tokens=2, ignore_eos=True).finish_reason == "length"


def test_huge_limits_are_clipped_by_the_context(client: Client) -> None:
    answer = client.generate("Hi", max_tokens=2**31 - 1, deadline_ms=2**31 - 1, stop=["e", "一", "a", "，"])
    assert answer.finish_reason in {"stop", "length"}


@pytest.mark.parametrize("body", ["", "{", "[]", '{"text_input": 5}', '{"text_input": ["a", "b"]}', "\x00"])
def test_malformed_http_is_a_client_error(server: Server, client: Client, body: str) -> None:
    status, text = curl(f"{server.addresses.http}/v2/models/gemma3/generate", body)
    assert 400 <= status < 600
    assert "error" in json.loads(text)
    assert client.generate("Hi", max_tokens=1, ignore_eos=True).token_ids


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({"max_token": 2}, "did you mean 'max_tokens'"),
        ({"temprature": 0.5}, "did you mean 'temperature'"),
        ({"colour": "red"}, "inputs are"),
    ],
)
def test_misspelt_inputs_over_http_are_refused_by_name(server: Server, sent: dict[str, Any], said: str) -> None:
    status, text = curl(f"{server.addresses.http}/v2/models/gemma3/generate", {"text_input": "Hi", **sent})
    assert status == 400
    assert said in json.loads(text)["error"]


@pytest.mark.parametrize("sent", [{"seed": -1}, {"max_tokens": 2**31}, {"messages": []}, {"max_tokens": 3.7}])
def test_values_that_triton_cannot_read_are_errors_too(server: Server, client: Client, sent: dict[str, Any]) -> None:
    status, text = curl(f"{server.addresses.http}/v2/models/gemma3/generate", {"text_input": "Hi", **sent})
    assert 400 <= status <= 500
    assert "error" in json.loads(text)
    assert client.generate("Hi", max_tokens=1, ignore_eos=True).token_ids


def test_a_stop_without_an_id_stops_nobody(server: Server, client: Client) -> None:
    pieces = client.stream("Hi", max_tokens=200, ignore_eos=True)
    first = next(pieces)
    status, text = curl(f"{server.addresses.http}/v2/models/decoder/generate", {"command": "stop"})
    assert status == 400
    assert "request_id" in json.loads(text)["error"]
    assert sum(len(one.token_ids) for one in (first, *pieces)) == 200


def test_a_flood_of_pictures_is_refused_or_ends_in_time(server: Server) -> None:
    picture = png(900, 700)

    def ask(_: int) -> str:
        try:
            with Client(server.addresses.grpc) as own:
                own.generate("Hi", images=[picture], deadline_ms=500, max_tokens=2, ignore_eos=True)
        except WiCoreError as error:
            return error.code
        return "answered"

    begin = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        codes = set(pool.map(ask, range(200)))
    assert codes <= {"answered", "overloaded", "deadline_exceeded"}
    assert time.monotonic() - begin < 60


def test_commands_that_there_are_not_are_refused_with_those_there_are(server: Server) -> None:
    error = refusal(server.addresses.grpc, text_input="Hi", command="burn")
    assert type(error) is InvalidParameterError
    assert "stop, stats, line and session" in error.message
