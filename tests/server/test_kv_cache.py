"""The KV cache through a real server: turns reuse what was computed, and the tiers are visible."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from client import AsyncClient, Client
from client.commands.app import app
from client.commands.stats import drawn, read_stats
from client.server import Server
from client.sessions import SessionState
from python_backends.errors import InvalidParameterError, SessionNotFoundError
from tests.server.conftest import options_for

SETTINGS = {"enable_hmt": True, "cpu_memory_gb": 2.0, "nvme_memory_gb": 0.5, "kv_block_tokens": 16}


@pytest.fixture(scope="module")
def tiered(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo model's repository with all three tiers."""
    folder = tmp_path_factory.mktemp("tiered") / "model_repository"
    folder.mkdir()
    for item in repository.iterdir():
        (folder / item.name).symlink_to(item)
    settings = SETTINGS | {"nvme_path": str(tmp_path_factory.mktemp("nvme"))}
    (folder / "wicore.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def picture() -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    image.paste("red", (10, 10, 40, 40))
    return image


def test_a_session_is_kept_by_name_over_a_restart_and_erased(tiered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}
    ask: dict[str, Any] = {"images": [picture()], "max_tokens": 12, "cache_salt": "me"}
    with Server(options_for(tiered)) as server, Client(server.addresses.grpc, timeout_s=60) as client:
        first = client.generate(messages=[message], session="holiday", **ask)
        assert client.session("holiday", cache_salt="me").tokens >= first.usage.prompt_tokens
        assert client.session("holiday", "save", cache_salt="me").bytes["nvme"] > 0
        with pytest.raises(SessionNotFoundError):
            client.session("holiday")
    follow = [message, first.message, {"role": "user", "content": "Why?"}]
    with Server(options_for(tiered)) as server, Client(server.addresses.grpc, timeout_s=60) as client:
        arguments = ["holiday", "--salt", "me", "--json", "--address", server.addresses.grpc]
        shown = CliRunner().invoke(app, ["session", "restore", *arguments])
        assert json.loads(shown.stdout)["bytes"]["host"] > 0
        turn = client.generate(messages=follow, session="holiday", **ask)
        assert turn.usage.cached_tokens["host"] >= first.usage.prompt_tokens
        unsalted = client.generate(messages=follow, **ask | {"cache_salt": ""})
        assert sum(unsalted.usage.cached_tokens.values()) == 0
        erased = asyncio.run(erase(server.addresses.grpc))
        assert erased.tokens >= turn.usage.prompt_tokens
        assert CliRunner().invoke(app, ["session", "show", *arguments]).exit_code == 1
        assert CliRunner().invoke(app, ["session", "burn", *arguments]).exit_code == 1


async def erase(address: str) -> SessionState:
    async with AsyncClient(address) as client:
        return await client.session("holiday", "erase", cache_salt="me")


def test_a_conversation_about_a_picture_is_computed_once(tiered: Path) -> None:
    with Server(options_for(tiered)) as server, Client(server.addresses.grpc, timeout_s=60) as client:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}
        first = client.generate(messages=[message], images=[picture()], max_tokens=12)
        again = client.generate(messages=[message], images=[picture()], max_tokens=12)
        assert again.text == first.text
        assert first.usage.cached_tokens["device"] == 0
        assert again.usage.cached_tokens["device"] == first.usage.prompt_tokens - 1
        assert again.usage.cache_miss == ""
        follow = [message, first.message, {"role": "user", "content": "Why?"}]
        turn = client.generate(messages=follow, images=[picture()], max_tokens=8)
        assert turn.usage.cached_tokens["device"] >= first.usage.prompt_tokens - 1
        salted = client.generate(messages=[message], images=[picture()], max_tokens=12, cache_salt="other")
        assert (salted.text, sum(salted.usage.cached_tokens.values())) == (first.text, 0)
        with pytest.raises(InvalidParameterError, match="1024 characters"):
            client.generate("Hi", session="x" * 1025)
        stats = read_stats(server.addresses.grpc)
        assert stats["kv_cache"]["prompt_tokens"]["device"] > 0
        lines = "\n".join(drawn(stats))
        assert all(word in lines for word in ("slots", "device", "host", "nvme", "prompt"))
        host, port = server.addresses.grpc.split(":")[0], server.addresses.metrics_port
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as page:
            metrics = page.read().decode()
        assert 'wicore_kv_entries{tier="device"}' in metrics
        server.check()
