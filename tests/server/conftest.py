"""A real tritonserver with the demo model, started once for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from builders.build import Options, build
from builders.quantize import Precision
from client import Client
from client.server import Server, ServerOptions
from client.server.installation import cache_folder as cache_home
from tests.paths import DEMO_CHECKPOINT


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, for the processes they start too; but compiled kernels, which are named by a
    hash of all that they are made of, are the user's: a busy machine needs minutes for them."""
    folder = tmp_path_factory.mktemp("cache")
    kernels = cache_home() / "kernels"
    kernels.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "wicore").mkdir()
    (folder / "wicore" / "kernels").symlink_to(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, built in float32."""
    folder = tmp_path_factory.mktemp("served") / "model_repository"
    build(DEMO_CHECKPOINT, folder, Options(Precision("fp32")))
    return folder


def options_for(repository: Path) -> ServerOptions:
    """Free ports."""
    return ServerOptions(repository, http_port=0, grpc_port=0, metrics_port=0, drain_s=2)


@pytest.fixture(scope="session")
def server(repository: Path, cache_folder: Path) -> Iterator[Server]:
    """Running and, at the end, still whole."""
    with Server(options_for(repository)) as running:
        yield running
        running.check()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    """Connected to it."""
    with Client(server.addresses.grpc, timeout_s=60) as connected:
        yield connected
