"""Sessions over plain HTTP, against a real server with all tiers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from client.gateway.settings import GatewaySettings
from client.server import Server
from client.server.gateway import Gateway
from python_backends.config import Config
from tests.server.conftest import options_for
from tests.server.gateway.conftest import MODEL

SALT = {"wicore-cache-salt": "me"}


@pytest.fixture(scope="module")
def tiered(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    config = Config(
        cpu_memory_gb=1.0, nvme_memory_gb=0.1, nvme_path=str(tmp_path_factory.mktemp("kv")), kv_block_tokens=16
    )
    with Server(dataclasses.replace(options_for(repository), config=config)) as server:
        gateway = Gateway(GatewaySettings(repository, MODEL, triton=server.addresses.grpc, port=0, config=config))
        gateway.start()
        try:
            with httpx.Client(base_url=gateway.address, timeout=60) as client:
                yield client
        finally:
            gateway.stop()


def ask(client: httpx.Client, session: str, salt: str) -> None:
    body = {"prompt": "How many shapes are there?", "max_tokens": 8, "session": session, "cache_salt": salt}
    assert client.post("/v1/inference", json=body).status_code == 200


def test_a_session_is_shown_saved_pinned_and_erased_under_its_salt_alone(tiered: httpx.Client) -> None:
    name = "holiday/photos 2026"
    path = "/v1/sessions/holiday%2Fphotos%202026"
    ask(tiered, name, "me")
    shown = tiered.get(path, headers=SALT).json()
    assert shown["session"] == name
    assert shown["tokens"] > 8
    assert (shown["bytes"]["nvme"], shown["pinned"]) == (0, False)
    assert tiered.get(path).status_code == 404
    saved = tiered.post(path, headers=SALT, json={"action": "save"}).json()
    assert saved["bytes"]["nvme"] == saved["bytes"]["device"] > 0
    for action, pinned in (("pin", True), ("restore", True), ("prefetch", True), ("unpin", False)):
        assert tiered.post(path, headers=SALT, json={"action": action}).json()["pinned"] is pinned
    assert tiered.delete(path).status_code == 404, "another salt's"
    assert tiered.delete(path, headers=SALT).json()["tokens"] == shown["tokens"]
    gone = tiered.get(path, headers=SALT)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "session_not_found")


@pytest.mark.parametrize("body", [{}, {"action": "burn"}, {"action": "erase"}, {"action": "pin", "more": 1}])
def test_what_is_no_command_is_refused(tiered: httpx.Client, body: dict[str, object]) -> None:
    answer = tiered.post("/v1/sessions/x", json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"]


def test_a_server_without_a_disk_says_so(http: httpx.Client) -> None:
    ask(http, "here", "")
    answer = http.post("/v1/sessions/here", json={"action": "save"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported")
    assert http.delete("/v1/sessions/here").status_code == 200
