"""The page in headless Chromium, before a real server whose KV cache has tiers."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, sync_playwright

from client import Client
from client.gateway.settings import GatewaySettings
from client.server import Server
from client.server.gateway import Gateway
from python_backends.config import Config
from tests.server.conftest import options_for
from tests.server.gateway.conftest import MODEL, run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
SETTINGS = {"enable_hmt": True, "cpu_memory_gb": 1.0, "kv_block_tokens": 16, "max_batch_size": 8, "max_queue": 16}
WIDE = {"width": 1360, "height": 850}

OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium as the system has it. Playwright's event loop keeps other tests from running theirs: it ends with the
    module."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing = "no Chromium; on Debian and Ubuntu: apt-get install chromium"
        if "CI" in os.environ:
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def tiered(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's repository with a KV cache in tiers."""
    folder = tmp_path_factory.mktemp("page") / "model_repository"
    folder.mkdir()
    for item in repository.iterdir():
        (folder / item.name).symlink_to(item)
    settings = SETTINGS | {"nvme_path": str(tmp_path_factory.mktemp("nvme")), "nvme_memory_gb": 0.5}
    (folder / "wicore.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def server(tiered: Path) -> Iterator[Server]:
    """Running and, at the end, still whole."""
    with Server(options_for(tiered)) as running:
        yield running
        running.check()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    """Connected to it."""
    with Client(server.addresses.grpc, timeout_s=60) as connected:
        yield connected


@pytest.fixture(scope="session")
def settings(server: Server, tiered: Path) -> GatewaySettings:
    """Free port."""
    return GatewaySettings(tiered, MODEL, triton=server.addresses.grpc, port=0, config=Config(drain_s=5))


@pytest.fixture(scope="session")
def gateway(settings: GatewaySettings) -> Iterator[Gateway]:
    """Of its own: one that is shared would stay before this server for the tests elsewhere, too."""
    yield from run(settings)


@pytest.fixture
def open_page(browser: Browser, gateway: Gateway) -> Iterator[OpenPage]:
    """Opens the page in a browser profile of its own. What it complains about, or asks of another server, is an error.

    ``expected`` are beginnings of complaints that the test means to cause.
    """
    contexts, wrong = [], []

    def opened(address: str | None = None, expected: tuple[str, ...] = (), **profile: Any) -> Page:
        here = address or gateway.address
        context = browser.new_context(**{"locale": "en-US", "viewport": WIDE, **profile})
        contexts.append(context)
        page = context.new_page()

        def complain(text: str) -> None:
            if not text.startswith(expected or ("\0",)):
                wrong.append(text)

        page.on("console", lambda said: complain(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complain(str(error)))
        page.on(
            "request",
            lambda asked: None if asked.url.startswith((here, "data:", "blob:")) else complain(f"asked {asked.url}"),
        )
        page.set_default_timeout(20_000)
        page.goto(here)
        page.locator("#gauges .gauge, dialog[open]").first.wait_for(state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def png(picture: Image.Image) -> bytes:
    """Encoded."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def transfer(page: Page, data: bytes, name: str = "picture.png", kind: str = "image/png") -> Any:
    """A file as it hangs on the pointer, or lies on the clipboard."""
    text = base64.b64encode(data).decode()
    return page.evaluate_handle(
        """([text, name, type]) => {
          const found = new DataTransfer();
          const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
          found.items.add(new File([bytes], name, { type }));
          return found;
        }""",
        [text, name, kind],
    )


def drop(page: Page, data: bytes, name: str = "picture.png", kind: str = "image/png") -> None:
    """Drag a file over the page and let it fall."""
    held = transfer(page, data, name, kind)
    page.dispatch_event("#messages", "dragenter", {"dataTransfer": held})
    assert page.is_visible("#drop")
    page.dispatch_event("#messages", "drop", {"dataTransfer": held})
    assert page.is_hidden("#drop")


def ask(page: Page, text: str) -> str:
    """Write and send with the keyboard; the answer, once it is complete."""
    count = page.locator(".message.assistant").count()
    page.fill("#message", text)
    page.press("#message", "Enter")
    return answer(page, count)


def answer(page: Page, place: int) -> str:
    """The answer at a place, once it is complete."""
    message = page.locator(".message.assistant").nth(place)
    message.locator(".row").wait_for()
    return message.locator(".text").inner_text().strip()


def endless(page: Page, max_tokens: int = 20_000) -> None:
    """Answers go on and on: what the page asks is passed on, with what the page has no setting for."""

    def change(route: Route) -> None:
        body = json.loads(route.request.post_data or "{}")
        body |= {"ignore_eos": True, "max_tokens": max_tokens, "temperature": 5.0}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", change)


def until(page: Page, script: str, argument: Any = None, timeout_s: float = 20) -> None:
    """Wait for a script to give something true. Playwright's own way needs eval, which the page's policy forbids."""
    deadline = time.monotonic() + timeout_s
    while not page.evaluate(script, argument):
        assert time.monotonic() < deadline, f"never: {script}"
        page.wait_for_timeout(20)


def idle(address: str, timeout_s: float = 5) -> None:
    """Wait until no slot is in use."""
    deadline = time.monotonic() + timeout_s
    while running(address):
        assert time.monotonic() < deadline, "the engine goes on"
        time.sleep(0.05)


def running(address: str) -> int:
    """Slots in use."""
    return int(httpx.get(f"{address}/v1/stats").raise_for_status().json()["batch"]["running"])
