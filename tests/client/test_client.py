"""The client library over a real gRPC connection."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from client import AsyncClient, Client
from python_backends.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidImageError,
    InvalidParameterError,
    OverloadedError,
    ServerUnavailableError,
    WiCoreError,
)
from tests.client.triton_double import Response, counting, piece, serving


def test_an_answer_joins_its_pieces_and_keeps_their_figures() -> None:
    with serving(counting) as server, Client(server.address) as client:
        answer = client.generate("Hi", request_id="mine")
    assert answer.text == "Hello world"
    assert answer.token_ids == (1, 2)
    assert answer.logprobs == (-0.5, -0.5)
    assert (answer.finish_reason, answer.request_id) == ("stop", "mine")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2)
    assert 0 < answer.ttft_s <= answer.duration_s


def test_the_first_piece_arrives_before_the_last_is_made() -> None:
    asked = threading.Event()

    def waits(values: dict[str, Any]) -> Iterator[Response]:
        yield piece("first")
        assert asked.wait(10)
        yield piece("last", (1,), "stop")

    with serving(waits) as server, Client(server.address) as client:
        pieces = client.stream("Hi")
        assert next(pieces).text == "first"
        asked.set()
        assert [one.text for one in pieces] == ["last"]


def test_every_request_has_an_id_of_its_own() -> None:
    seen: list[bytes] = []

    def remember(values: dict[str, Any]) -> Iterator[Response]:
        seen.append(values["request_id"].item())
        yield piece("x", (1,), "stop")

    with serving(remember) as server, Client(server.address) as client:
        for _ in range(3):
            client.generate("Hi")
    assert len(set(seen)) == 3
    assert all(seen)


def test_one_connection_carries_many_requests_at_once() -> None:
    together = threading.Barrier(8, timeout=10)

    def meet(values: dict[str, Any]) -> Iterator[Response]:
        together.wait()
        yield piece(values["text_input"].item().decode(), (1,), "stop")

    prompts = [f"prompt {number}" for number in range(8)]
    with serving(meet) as server, Client(server.address) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(client.generate, prompts))
        assert [answer.text for answer in answers] == prompts
        assert len(server.peers) == 1


def test_nobody_at_the_address_is_said_with_the_way_out() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with Client(address) as client:
            assert not client.ready(timeout_s=1)
            with pytest.raises(ServerUnavailableError, match="wicore serve"):
                client.generate("Hi")


ERRORS = [
    ("in ensemble 'gemma3', invalid_image: not a readable PNG", InvalidImageError, "not a readable PNG"),
    ("overloaded: 256 requests wait", OverloadedError, "256 requests wait"),
    ("Stub process 'decoder_0_0' is not healthy.", ServerUnavailableError, "restart it"),
    ("something else", InternalError, "something else"),
]


@pytest.mark.parametrize(("said", "kind", "shown"), ERRORS)
def test_errors_of_the_server_arrive_as_their_class(said: str, kind: type[WiCoreError], shown: str) -> None:
    def refuse(values: dict[str, Any]) -> Iterator[Response]:
        yield Response(error_message=said)

    with serving(refuse) as server, Client(server.address) as client:
        with pytest.raises(kind, match=shown):
            client.generate("Hi")
        client.close()
        assert server.stopped == []


def test_an_answer_that_ends_early_gives_its_text_and_then_raises() -> None:
    def too_slow(values: dict[str, Any]) -> Iterator[Response]:
        yield piece("half ")
        yield piece("an answer", (1,), "deadline", "deadline_exceeded")

    with serving(too_slow) as server, Client(server.address) as client:
        heard: list[str] = []
        with pytest.raises(DeadlineExceededError):
            heard.extend(one.text for one in client.stream("Hi"))
        pieces = client.stream("Hi")
        assert [next(pieces).text, next(pieces).text] == ["half ", "an answer"]


def test_a_stream_that_breaks_off_is_an_error() -> None:
    def broken(values: dict[str, Any]) -> Iterator[Response]:
        yield piece("half")

    with serving(broken) as server, Client(server.address) as client, pytest.raises(ServerUnavailableError):
        client.generate("Hi")


def mixed(values: dict[str, Any]) -> Iterator[Response]:
    """As many answers as were asked for, the second of which ends first."""
    count = values["n"].item()
    prompt = {"token_ids": [4, 5], "logprobs": [-1.5, -2.5], "top": [[[9, -0.25]], [[5, -2.5]]]}
    yield piece("a", (10,), index=0, prompt_token_logprobs=prompt)
    for index in reversed(range(1, count)):
        yield piece(f"b{index}", (index,), "length", index=index)
    yield piece("c", (11,), index=0)
    yield piece("", (1,), "stop", index=0)


def test_several_answers_are_told_apart() -> None:
    with serving(mixed) as server, Client(server.address) as client:
        answers = client.generate_n("Hi", n=3)
        assert [(one.index, one.text, one.token_ids, one.finish_reason) for one in answers] == [
            (0, "ac", (10, 11, 1), "stop"),
            (1, "b1", (1,), "length"),
            (2, "b2", (2,), "length"),
        ]
        assert all(one.usage.prompt_tokens == 3 for one in answers)
        assert all(0 < one.ttft_s <= one.duration_s for one in answers)
        assert [one.index for one in client.stream("Hi", n=2)] == [0, 1, 0, 0]
        assert len(client.generate_n("Hi", n=np.int64(2))) == 2  # type: ignore[arg-type]
        client.close()
        assert server.stopped == []


def test_several_answers_do_not_fit_into_one() -> None:
    with serving(mixed) as server, Client(server.address) as client:
        with pytest.raises(InvalidParameterError, match=r"n is 2.*generate_n"):
            client.generate("Hi", n=2)
        assert client.generate("Hi", n=1).text == "ac"


def test_one_of_several_answers_that_does_not_end_is_an_error() -> None:
    def broken(values: dict[str, Any]) -> Iterator[Response]:
        yield piece("whole", (1,), "stop", index=1)
        yield piece("half", (1,), index=0)

    with serving(broken) as server, Client(server.address) as client, pytest.raises(ServerUnavailableError):
        client.generate_n("Hi", n=2)


def test_an_answer_that_ends_early_waits_for_the_others_before_it_raises() -> None:
    def too_slow(values: dict[str, Any]) -> Iterator[Response]:
        yield piece("half", (1,), "deadline", "deadline_exceeded", index=0)
        yield piece("whole", (1,), "stop", index=1)

    with serving(too_slow) as server, Client(server.address) as client:
        pieces = client.stream("Hi", n=2)
        assert [next(pieces).text, next(pieces).text] == ["half", "whole"]
        with pytest.raises(DeadlineExceededError):
            next(pieces)


def test_leaving_before_every_answer_has_ended_stops_the_request() -> None:
    with serving(mixed) as server, Client(server.address) as client:
        pieces = client.stream("Hi", n=2, request_id="left")
        assert [next(pieces).index, next(pieces).index] == [0, 1]
        pieces.close()
        assert server.stop_seen.wait(10)


def test_a_tool_is_called_and_its_result_goes_back() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    asked: list[Any] = []

    def calls_once(values: dict[str, Any]) -> Iterator[Response]:
        asked.append(json.loads(values["messages"].item()))
        if len(asked) == 1:
            yield piece("Wait. ", (1,))
            yield piece("", (2, 3), "tool_calls", tool_calls=[call])
        else:
            yield piece("It rains.", (4,), "stop")

    messages: list[Any] = [{"role": "user", "content": "Weather?"}]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    with serving(calls_once) as server, Client(server.address) as client:
        answer = client.generate(messages=messages, tools=tools, tool_choice="auto")
        assert (answer.text, answer.finish_reason) == ("Wait. ", "tool_calls")
        (wanted,) = answer.tool_calls
        assert (wanted.id, wanted.name, wanted.parsed()) == ("call_1", "weather", {"city": "Köln"})
        messages += [answer.message, wanted.result("rain")]
        last = client.generate(messages=messages, tools=tools)
    assert asked[1] == [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Wait. ", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    assert answer.as_dict()["tool_calls"] == [call]
    assert (last.text, last.message) == ("It rains.", {"role": "assistant", "content": "It rains."})


def test_log_probabilities_are_kept_token_by_token() -> None:
    prompt = {"token_ids": [4, 5], "logprobs": [-1.5, -2.5], "top": [[[9, -0.25], [4, -1.5]], [[5, -2.5]]]}

    def likely(values: dict[str, Any]) -> Iterator[Response]:
        yield piece("a", (1, 2), prompt_token_logprobs=prompt, top_logprobs=[[[1, -0.5], [3, -0.75]], [[8, -0.125]]])
        yield piece("b", (3,), "stop", top_logprobs=[[[3, -0.5]]])

    with serving(likely) as server, Client(server.address) as client:
        answer = client.generate("Hi", logprobs=2, prompt_logprobs=2)
    assert answer.token_ids == (1, 2, 3)
    assert answer.top_logprobs == (((1, -0.5), (3, -0.75)), ((8, -0.125),), ((3, -0.5),))
    assert answer.top_logprobs[1][0].token_id == 8
    found = answer.prompt_logprobs
    assert found is not None
    assert (found.token_ids, found.logprobs) == ((4, 5), (-1.5, -2.5))
    assert found.top[0][1].logprob == -1.5


def test_asyncio_gives_several_answers_too() -> None:
    async def ask(address: str) -> list[str]:
        async with AsyncClient(address) as client:
            with pytest.raises(InvalidParameterError, match="generate_n"):
                await client.generate("Hi", n=2)
            return [answer.text for answer in await client.generate_n("Hi", n=2)]

    with serving(mixed) as server:
        assert asyncio.run(ask(server.address)) == ["ac", "b1"]


def test_asyncio_answers_at_once_over_one_connection() -> None:
    async def ask(address: str) -> list[str]:
        async with AsyncClient(address) as client:
            assert await client.ready()
            answers = await asyncio.gather(*(client.generate(f"{number}") for number in range(20)))
            return [answer.text for answer in answers]

    with serving(counting) as server:
        assert asyncio.run(ask(server.address)) == ["Hello world"] * 20
        assert len(server.peers) == 1


def test_asyncio_raises_the_same_exceptions() -> None:
    def refuse(values: dict[str, Any]) -> Iterator[Response]:
        yield Response(error_message="in ensemble 'gemma3', invalid_image: broken")

    async def ask(address: str) -> None:
        async with AsyncClient(address) as client:
            await client.generate("Hi")

    with serving(refuse) as server, pytest.raises(InvalidImageError, match="broken"):
        asyncio.run(ask(server.address))
    with pytest.raises(ServerUnavailableError, match="wicore serve"):
        asyncio.run(ask("127.0.0.1:1"))
