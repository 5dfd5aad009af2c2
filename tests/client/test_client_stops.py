"""A caller who goes away stops its request at the decoder: streams, clients, tasks and whole programs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from contextlib import aclosing

import pytest

from client import AsyncClient, Client
from python_backends.errors import DeadlineExceededError
from tests.client.triton_double import counting, endless, serving


def test_closing_a_stream_stops_its_request_at_the_decoder() -> None:
    with serving(endless) as server, Client(server.address) as client:
        pieces = client.stream("Hi", request_id="left")
        next(pieces)
        begin = time.monotonic()
        pieces.close()
        assert time.monotonic() - begin < 1
        assert server.stop_seen.wait(10)
    assert server.stopped == ["left"]


def test_closing_the_client_stops_what_is_not_complete() -> None:
    with serving(endless) as server:
        client = Client(server.address)
        pieces = [client.stream("Hi", request_id=f"open {number}") for number in range(3)]
        for one in pieces:
            next(one)
        client.close()
        assert sorted(server.stopped) == ["open 0", "open 1", "open 2"]
        for one in pieces:
            one.close()
        assert len(server.stopped) == 3


LEFT_OPEN = """
import sys
from client import Client
client = Client(sys.argv[1])
pieces = client.stream("Hi", request_id="forgotten")
next(pieces)
if sys.argv[2] == "raises":
    raise RuntimeError("the caller's own")
"""


@pytest.mark.parametrize("end", ["falls off", "raises"])
def test_a_program_that_ends_with_an_open_stream_stops_it_and_ends(end: str) -> None:
    with serving(endless) as server:
        command = [sys.executable, "-c", LEFT_OPEN, server.address, end]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == (end == "raises")
        assert ("the caller's own" in done.stderr) == (end == "raises")
        assert "Traceback" not in done.stderr.partition("the caller's own")[2]
        assert server.stopped == ["forgotten"]


def test_stops_go_on_after_the_server_was_restarted() -> None:
    with serving(endless) as first:
        port = int(first.address.rpartition(":")[2])
        client = Client(first.address)
        pieces = client.stream("Hi", request_id="first")
        next(pieces)
        pieces.close()
        assert first.stop_seen.wait(10)
    with serving(endless, port=port) as second, client:
        pieces = client.stream("Hi", request_id="second")
        next(pieces)
        pieces.close()
        assert second.stop_seen.wait(10)
        assert second.stopped == ["second"]


def test_an_exception_of_the_caller_stops_the_request() -> None:
    with serving(endless) as server, Client(server.address) as client:
        with pytest.raises(ZeroDivisionError):
            [1 / 0 for _ in client.stream("Hi", request_id="broken")]
        assert server.stop_seen.wait(10)
    assert server.stopped == ["broken"]


def test_a_complete_answer_is_not_stopped() -> None:
    with serving(counting) as server, Client(server.address) as client:
        client.generate("Hi")
        client.close()
        assert server.stopped == []


def test_a_timeout_stops_the_request_and_says_so() -> None:
    with serving(endless) as server, Client(server.address) as client:
        with pytest.raises(DeadlineExceededError, match="timeout"):
            client.generate("Hi", timeout_s=0.2)
        assert server.stop_seen.wait(10)


def test_cancelling_a_task_stops_its_request() -> None:
    async def leave(address: str) -> None:
        async with AsyncClient(address) as client:
            task = asyncio.create_task(client.generate("Hi", request_id="cancelled"))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with serving(endless) as server:
        asyncio.run(leave(server.address))
        assert server.stopped == ["cancelled"]


def test_leaving_an_async_stream_stops_its_request() -> None:
    async def leave(address: str) -> str:
        async with AsyncClient(address) as client, aclosing(client.stream("Hi", request_id="left")) as pieces:
            async for one in pieces:
                return one.text
        return ""

    with serving(endless) as server:
        assert asyncio.run(leave(server.address)) == "0 "
        assert server.stopped == ["left"]


def test_closing_the_async_client_stops_what_is_not_complete() -> None:
    async def leave(address: str) -> None:
        async with AsyncClient(address) as client:
            pieces = client.stream("Hi", request_id="open")
            async for _ in pieces:
                break
        await pieces.aclose()

    with serving(endless) as server:
        asyncio.run(leave(server.address))
        assert server.stopped == ["open"]
