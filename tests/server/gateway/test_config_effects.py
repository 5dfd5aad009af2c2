"""What the keys of the configuration do to the gateway."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.gateway.settings import GatewaySettings
from client.server.gateway import Gateway
from tests.server.gateway.conftest import StartGateway
from tests.server.gateway.test_abuse import CHAT, SLOW

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


@pytest.mark.effect("max_concurrent_requests")
def test_so_many_requests_are_answered_at_once(start_gateway: StartGateway) -> None:
    address = start_gateway(max_concurrent_requests=1).address
    with httpx.stream("POST", address + CHAT, json=SLOW) as held:
        assert held.status_code == 200
        lines = held.iter_lines()  # closes the answer when it goes
        assert next(lines)
        refused = httpx.post(address + CHAT, json=BODY)
    assert refused.status_code == 429
    assert "in flight" in refused.json()["error"]["message"]


@pytest.mark.effect("max_requests_per_minute")
def test_so_many_requests_are_answered_in_a_minute(start_gateway: StartGateway) -> None:
    address = start_gateway(max_requests_per_minute=2).address
    assert [httpx.post(address + CHAT, json=BODY).status_code for _ in range(4)] == [200, 200, 429, 429]


@pytest.mark.effect("max_connections")
def test_more_connections_than_there_may_be_are_refused(start_gateway: StartGateway) -> None:
    gateway = start_gateway(max_connections=8)
    address = ("127.0.0.1", gateway.settings.port)
    with contextlib.ExitStack() as held:
        for _ in range(8):
            held.enter_context(socket.create_connection(address))
        deadline = time.monotonic() + 5
        while (answer := httpx.get(f"{gateway.address}/health/live")).status_code != 503:
            assert time.monotonic() < deadline, "a ninth connection was served"
        assert answer.json()["error"]["code"] == "overloaded"
        assert answer.headers["retry-after"] == "1"
    deadline = time.monotonic() + 5
    while httpx.get(f"{gateway.address}/health/live").status_code != 200:
        assert time.monotonic() < deadline, "what was closed still counts"


@pytest.mark.effect("keep_alive_s")
def test_an_idle_connection_is_closed(start_gateway: StartGateway) -> None:
    gateway = start_gateway(keep_alive_s=2.0)
    request = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.settings.port), 20) as connection:
        for _ in range(2):  # it is kept meanwhile
            connection.sendall(request)
            received = b""
            while not received.endswith(b"}"):
                part = connection.recv(65536)
                assert part, "closed too soon"
                received += part
            assert received.startswith(b"HTTP/1.1 200")
            time.sleep(0.5)
        begin = time.monotonic()
        assert connection.recv(65536) == b""
        assert time.monotonic() - begin < 6


@pytest.mark.effect("server_port")
def test_the_gateway_listens_where_the_configuration_says(repository: Path, tmp_path: Path) -> None:
    from client.commands.serve import gateway_settings, read_settings

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    file = tmp_path / "wicore.json"
    file.write_text(f'{{"server_port": {port}}}', encoding="utf-8")
    _, config = read_settings(repository, file)
    settings = gateway_settings(repository, config, "127.0.0.1", None)
    assert isinstance(settings, GatewaySettings)
    running = Gateway(settings)
    running.start()
    try:
        assert httpx.get(f"http://127.0.0.1:{port}/health/live").status_code == 200
    finally:
        running.stop()
