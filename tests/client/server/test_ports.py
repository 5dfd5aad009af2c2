"""Ports are checked with the option that changes them."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.server.options import Addresses, ServerOptions
from client.server.ports import choose
from python_backends.errors import ServerStartError


def options(**values: Any) -> ServerOptions:
    free = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    return ServerOptions(Path("model_repository"), **{**free, **values})


def test_zero_picks_three_different_ports_that_can_be_bound() -> None:
    found = choose(options())
    ports = [found.http_port, found.grpc_port, found.metrics_port]
    assert len(set(ports)) == 3
    for port in ports:
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_a_named_port_is_kept() -> None:
    port = choose(options()).http_port
    assert choose(options(http_port=port)).http_port == port


@given(st.one_of(st.integers(max_value=-1), st.integers(min_value=65536)))
def test_numbers_that_are_no_ports_are_refused(port: int) -> None:
    with pytest.raises(ServerStartError, match="--metrics-port"):
        choose(options(metrics_port=port))


def test_the_same_port_twice_is_refused() -> None:
    with pytest.raises(ServerStartError, match="asked for twice"):
        choose(options(http_port=18_777, grpc_port=18_777))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_a_host_that_is_not_this_machine_is_refused(host: str) -> None:
    with pytest.raises(ServerStartError, match="--host"):
        choose(options(host=host))


@pytest.mark.parametrize(
    ("host", "grpc"), [("0.0.0.0", "127.0.0.1:2"), ("::", "[::1]:2"), ("::1", "[::1]:2"), ("10.0.0.1", "10.0.0.1:2")]
)
def test_addresses_can_be_connected_to(host: str, grpc: str) -> None:
    assert Addresses(host, 1, 2, 3).grpc == grpc
    assert Addresses(host, 1, 2, 3).http == f"http://{grpc[:-1]}1"
