"""The client library against a real server: together, stopped, and after the server's death."""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
from tritonclient.grpc import service_pb2_grpc

from builders.demo.evaluate import evaluate_batches, sample_picture
from client import AsyncClient, Client
from client.answer import read_piece
from client.commands.demo import server_answerer
from client.request import infer_request
from client.server import Server
from python_backends import contract
from python_backends.errors import ServerUnavailableError
from tests.server.conftest import options_for

LONG = {"max_tokens": 5000, "ignore_eos": True}


def test_requests_together_get_the_answers_they_get_alone(client: Client) -> None:
    asked = [sample_picture(seed)[:2] for seed in range(6)]
    alone = [client.generate(question, images=[picture], max_tokens=32).token_ids for picture, question in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda one: client.generate(one[1], images=[one[0]], max_tokens=32).token_ids, asked))
    assert together == alone


def test_asyncio_gets_the_same_answer(server: Server, client: Client) -> None:
    picture, question, _ = sample_picture(0)

    async def ask() -> tuple[int, ...]:
        async with AsyncClient(server.addresses.grpc) as connected:
            return (await connected.generate(question, images=[picture], max_tokens=32)).token_ids

    assert asyncio.run(ask()) == client.generate(question, images=[picture], max_tokens=32).token_ids


def test_one_seed_gives_one_answer(client: Client) -> None:
    draws = [client.generate("Hi", temperature=5.0, seed=7, max_tokens=16, ignore_eos=True) for _ in range(2)]
    other = client.generate("Hi", temperature=5.0, seed=8, max_tokens=16, ignore_eos=True)
    assert draws[0].token_ids == draws[1].token_ids != other.token_ids


def test_a_closed_stream_is_gone_from_the_decoder(client: Client) -> None:
    pieces = client.stream("Hi", request_id="closed", **LONG)  # type: ignore[arg-type]
    next(pieces)
    pieces.close()
    time.sleep(0.5)  # the step that runs ends first
    assert not client.stop("closed")


def test_a_request_can_be_stopped_by_another_client(server: Server, client: Client) -> None:
    pieces = client.stream("Hi", request_id="stopped", **LONG)  # type: ignore[arg-type]
    next(pieces)
    with Client(server.addresses.grpc) as other:
        assert other.stop("stopped")
    begin = time.monotonic()
    with contextlib.suppress(Exception):
        list(pieces)
    assert time.monotonic() - begin < 5
    assert not client.stop("stopped")


def test_more_requests_than_slots_are_all_answered(server: Server) -> None:
    async def ask() -> list[int]:
        async with AsyncClient(server.addresses.grpc) as connected:
            asks = (connected.generate(f"{n} circles?", max_tokens=8, ignore_eos=True) for n in range(48))
            return [len(answer.token_ids) for answer in await asyncio.gather(*asks)]

    assert asyncio.run(ask()) == [8] * 48


def test_the_demo_model_is_right_through_the_server(server: Server) -> None:
    with server_answerer(server.addresses.grpc) as answer:
        report = evaluate_batches(answer, 12, seed=3, batch=16, progress=False)
    assert report.accuracy >= 0.9, report.table()


def test_a_stream_ends_with_an_error_when_a_stage_is_killed(repository: Path) -> None:
    with Server(options_for(repository)) as server, Client(server.addresses.grpc) as client:
        pieces = client.stream("Hi", **LONG)  # type: ignore[arg-type]
        next(pieces)
        assert server.pid
        stages = {child.cmdline()[1]: child for child in psutil.Process(server.pid).children()}
        next(process for path, process in stages.items() if "decoder" in path).kill()
        with pytest.raises(ServerUnavailableError, match="stage decoder has died"):
            server.wait()
        server.stop()
        with pytest.raises(ServerUnavailableError):
            list(pieces)


def test_a_cancelled_call_straight_to_the_decoder_frees_its_slot(server: Server, client: Client) -> None:
    values = {"input_ids": list(range(300, 330)), "stream": True, "request_id": "direct", **LONG}
    request = infer_request(contract.MODELS[contract.DECODER], values, "direct")
    with grpc.insecure_channel(server.addresses.grpc) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]))
        assert read_piece(next(call))
        call.cancel()
        time.sleep(0.5)
        assert not client.stop("direct"), "the request still runs"
