"""Who holds a line to the decoder is missed when it goes, also by requests that went through the ensemble."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

from client import Client
from client.answer import read_piece
from client.request import Options, infer_request
from client.server import Server
from python_backends import contract
from python_backends.errors import CancelledError, InvalidParameterError

LONG: Options = {"max_tokens": 20_000, "ignore_eos": True, "temperature": 5.0}


@contextmanager
def line(server: Server, name: str) -> Iterator[Any]:
    """A call that holds it; its first answer has come."""
    values = {"command": "line", "request_id": name, "stream": True}
    request = infer_request(contract.MODELS[contract.DECODER], values, "line")
    with grpc.insecure_channel(server.addresses.grpc) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]), timeout=60)
        piece = read_piece(next(call))
        assert piece is not None
        assert piece.text == "open"
        yield call
        call.cancel()


def test_requests_end_with_the_line_that_they_name(server: Server, client: Client) -> None:
    name = secrets.token_hex(8)
    with line(server, name) as held, line(server, secrets.token_hex(8)):
        mine = client.stream("Hi", wicore_line=name, seed=1, **LONG)
        other = client.stream("Hi", seed=2, **LONG)
        next(mine)
        next(other)
        held.cancel()
        with pytest.raises(CancelledError):
            list(mine)
        assert next(other).finish_reason == ""
        other.close()
        with pytest.raises(CancelledError):
            client.generate("Hi", wicore_line=name)
    assert client.generate("Hi", wicore_line="nobody's", max_tokens=2).finish_reason == "length"


def test_a_line_has_a_name_that_no_other_has(server: Server) -> None:
    with pytest.raises(InvalidParameterError, match="line's name"), line(server, ""):
        pass
    with line(server, "twice"), pytest.raises(InvalidParameterError, match="already"), line(server, "twice"):
        pass


def test_a_line_through_the_ensemble_is_refused(client: Client) -> None:
    """Nobody would notice that its holder has gone."""
    command: Any = {"command": "line"}
    with pytest.raises(InvalidParameterError, match="behind an ensemble"):
        next(client.stream("Hi", request_id="a line", **command))
