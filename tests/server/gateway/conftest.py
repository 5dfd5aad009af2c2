"""A gateway in its own process, in front of the real server that all tests here share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.gateway.settings import GatewaySettings
from client.server import Server
from client.server.gateway import Gateway
from python_backends.config import Config

MODEL = "demo"

StartGateway = Callable[..., Gateway]


@pytest.fixture(scope="session")
def settings(server: Server, repository: Path) -> GatewaySettings:
    """Free port."""
    return GatewaySettings(repository, MODEL, triton=server.addresses.grpc, port=0, config=Config(drain_s=10))


@pytest.fixture(scope="session")
def gateway(settings: GatewaySettings) -> Iterator[Gateway]:
    """Running and, at the end, still the same process."""
    yield from run(settings)


def run(settings: GatewaySettings) -> Iterator[Gateway]:
    """A gateway for a fixture."""
    running = Gateway(settings)
    running.start()
    yield running
    running.check()
    running.stop()


@pytest.fixture
def start_gateway(settings: GatewaySettings) -> Iterator[StartGateway]:
    """Another one, with other settings; keys of the configuration go by their names."""
    started: list[Gateway] = []
    keys = {field.name for field in dataclasses.fields(Config)}

    def start(**values: Any) -> Gateway:
        config = dataclasses.replace(settings.config, **{name: values.pop(name) for name in keys & set(values)})
        started.append(Gateway(dataclasses.replace(settings, config=config, **values)))
        started[-1].start()
        return started[-1]

    yield start
    for running in started:
        running.stop()


@pytest.fixture(scope="session")
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    """Plain HTTP to it."""
    with httpx.Client(base_url=gateway.address, timeout=60) as client:
        yield client
