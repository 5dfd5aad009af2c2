"""What the gateway says of its own state and its server's."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import psutil
import pytest

from client.server import Server
from client.server.gateway import Gateway
from tests.server.conftest import options_for
from tests.server.gateway.conftest import StartGateway
from tests.server.gateway.serving import (
    events_of,
    wait_until_answered,
    wait_until_idle,
    wait_until_ready,
    wicore_serve,
)


def test_every_stage_is_asked(http: httpx.Client) -> None:
    answer = http.get("/health/ready")
    assert answer.status_code == 200
    stages = dict.fromkeys(("tokenizer", "image_processor", "vision_encoder", "decoder"), "")
    assert answer.json() == {"status": "ready", "stages": stages}


def test_the_gateway_lives_without_triton_and_is_not_ready(start_gateway: StartGateway) -> None:
    address = start_gateway(triton="127.0.0.1:1").address
    assert httpx.get(f"{address}/health/live").json() == {"status": "live"}
    answer = httpx.get(f"{address}/health/ready")
    assert answer.status_code == 503
    assert all("wicore serve" in why for why in answer.json()["stages"].values())


def test_a_dead_stage_is_not_ready_though_triton_calls_itself_so(repository: Path, start_gateway: StartGateway) -> None:
    with Server(options_for(repository)) as server:
        address = start_gateway(triton=server.addresses.grpc).address
        wait_until_ready(address)
        stages = {child.cmdline()[1]: child for child in psutil.Process(server.pid).children()}
        next(process for path, process in stages.items() if "tokenizer" in path).kill()
        time.sleep(1.1)
        answer = httpx.get(f"{address}/health/ready", timeout=30)
        assert httpx.get(f"{server.addresses.http}/v2/health/ready").status_code == 200
    found = answer.json()["stages"]
    assert answer.status_code == 503
    assert [stage for stage, why in found.items() if why] == ["tokenizer"]


def test_a_page_may_load_nothing_from_elsewhere(http: httpx.Client) -> None:
    answer = http.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert not [word for word in ("http:", "https:", "unsafe", "*") if word in policy]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("POST", "/v1/nothing", 404), ("POST", "/health/live", 405), ("GET", "/../x", 404)],
)
def test_what_is_not_there_is_refused_in_openais_shape(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_port_that_is_taken_is_named_with_its_option(gateway: Gateway, start_gateway: StartGateway) -> None:
    from python_backends.errors import ServerStartError

    with pytest.raises(ServerStartError, match=rf"{gateway.settings.port}.*--gateway-port"):
        start_gateway(port=gateway.settings.port)


def test_without_the_gateway_triton_serves_alone(repository: Path) -> None:
    with wicore_serve(repository, "--no-gateway") as (_, ready):
        assert "gateway" not in ready
        assert httpx.get(f"{ready['http']}/v2/health/ready").status_code == 200


def test_what_a_killed_gateway_had_asked_for_is_stopped(gateway: Gateway, start_gateway: StartGateway) -> None:
    victim, address = start_gateway(), gateway.address
    wait_until_answered(victim.address)
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
        events_of(victim.address, lambda: kill_at_work(victim, address))
    wait_until_idle(address)
    victim.start()
    assert wait_until_answered(victim.address) == set()


def kill_at_work(gateway: Gateway, other: str) -> None:
    """Kill a gateway while the engine works for it."""
    assert httpx.get(f"{other}/v1/stats").json()["batch"]["running"] > 0
    gateway.kill()
