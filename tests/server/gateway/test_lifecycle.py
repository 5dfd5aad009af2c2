"""The gateway under `wicore serve`: what is ready, what dies, and an end that loses no answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from client.server import Server
from client.server.gateway import Gateway
from tests.server.conftest import options_for
from tests.server.gateway.conftest import StartGateway
from tests.server.test_serve import left_by

RECOVERY_S = 10


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


@contextmanager
def wicore_serve(repository: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command, and what it says when it is ready."""
    ports = [option for name in ("http", "grpc", "metrics", "gateway") for option in (f"--{name}-port", "0")]
    command = [sys.executable, "-m", "client.cli", "serve", "--repository", str(repository), "--json", *ports, *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, json.loads(process.stdout.readline())
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(60)


def wait_until_ready(address: str, timeout_s: float = RECOVERY_S) -> float:
    """Seconds it took."""
    begin = time.monotonic()
    while time.monotonic() - begin < timeout_s:
        try:
            if httpx.get(f"{address}/health/ready", timeout=10).status_code == 200:
                return time.monotonic() - begin
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not ready after {timeout_s} s")


def last_event(address: str, after_first: Callable[[], object]) -> dict[str, Any]:
    """Of a long stream; ``after_first`` is called once it has begun."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5000, "ignore_eos": True, "n": 8}
    sampled = {**body, "temperature": 5.0, "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=sampled, timeout=RECOVERY_S) as answer:
        lines = answer.iter_lines()
        next(lines)
        after_first()
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    found: dict[str, Any] = json.loads(events[-2])
    return found


def test_whatever_is_killed_serves_again_and_the_end_leaves_nothing(repository: Path) -> None:
    before = set(left_by(repository))
    with wicore_serve(repository) as (process, first):
        address = first["gateway"]
        os.kill(first["gateway_pid"], signal.SIGKILL)
        time.sleep(0.2)
        wait_until_ready(address)
        stages = psutil.Process(first["pid"]).children()
        decoder = next(child for child in stages if "/decoder/" in child.cmdline()[1])
        assert last_event(address, decoder.kill)["error"]["code"] == "server_unavailable"
        wait_until_ready(address)
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert lines[0]["pid"] == first["pid"], "Triton had not died"
        assert lines[1]["pid"] != first["pid"]
        assert [line["gateway"] for line in lines] == [address, address]
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM  # the drain may take its 30 s
    assert set(left_by(repository)) <= before


def test_without_the_gateway_triton_serves_alone(repository: Path) -> None:
    with wicore_serve(repository, "--no-gateway") as (_, ready):
        assert "gateway" not in ready
        assert httpx.get(f"{ready['http']}/v2/health/ready").status_code == 200
