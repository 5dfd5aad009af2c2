"""Pictures before anything is sent: only from named hosts, only so many, so large."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from client.gateway.images import ImageReader
from client.gateway.settings import GatewaySettings
from python_backends.config import Config
from python_backends.errors import ImageCountError, ImageTooLargeError, InvalidImageError, WiCoreError

LIMITS = Config(max_images=2, max_image_bytes=100_000, max_image_pixels=1_000_000)


def png(width: int = 8, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def bomb(side: int = 60_000) -> bytes:
    """A few kilobytes that would be gigabytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 4_000_000))
        + chunk(b"IEND", b"")
    )


def read(*sources: str, config: Config = LIMITS) -> list[bytes]:
    return asyncio.run(ImageReader(GatewaySettings(Path(), "demo", config=config)).read(sources))


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/picture.png")
            self.end_headers()
            return
        data = png() if self.path == "/picture.png" else b"x" * 200_000
        self.send_response(200 if self.path != "/missing" else 404)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_base64_and_data_urls_give_the_bytes() -> None:
    assert read(as_text(png()), "data:image/png;base64," + as_text(png(4, 4))) == [png(), png(4, 4)]
    assert read() == []


@pytest.mark.parametrize(
    ("sources", "error", "says"),
    [
        (["", ""], InvalidImageError, "empty"),
        (["!!!"], InvalidImageError, "base64"),
        (["data:image/png,plain"], InvalidImageError, "base64"),
        ([as_text(b"no picture")], InvalidImageError, "readable"),
        ([as_text(png())] * 3, ImageCountError, "at most 2"),
        ([as_text(b"\x89PNG\r\n\x1a\n" + b"x" * 200_000)], ImageTooLargeError, "100,000"),
        ([as_text(bomb())], ImageTooLargeError, "pixels"),
        (["file:///etc/passwd"], InvalidImageError, "fetches nothing"),
        (["http://169.254.169.254/"], InvalidImageError, "fetches nothing"),
        (["\udcff"], InvalidImageError, "base64"),
    ],
)
def test_what_is_wrong_is_said_before_a_pixel_is_decoded(
    sources: list[str], error: type[WiCoreError], says: str
) -> None:
    with pytest.raises(error, match=says):
        read(*sources)


@pytest.mark.effect("image_hosts")
def test_addresses_are_fetched_from_named_hosts_alone(host: str) -> None:
    allowed = replace(LIMITS, image_hosts=" 127.0.0.1 , example.org")
    assert read(f"{host}/picture.png", as_text(png()), config=allowed) == [png(), png()]
    named = host.replace("127.0.0.1", "localhost")
    for address in (f"{named}/picture.png", "http://10.0.0.1/", "http://127.0.0.1.evil.org/", "http://[::1"):
        with pytest.raises(InvalidImageError, match=r"no pictures from|not an address"):
            read(address, config=allowed)


@pytest.mark.parametrize(
    ("path", "error", "says"),
    [
        ("/moved", InvalidImageError, "status 302"),
        ("/missing", InvalidImageError, "status 404"),
        ("/large", ImageTooLargeError, "more than"),
    ],
)
def test_what_a_host_gives_is_bounded(host: str, path: str, error: type[WiCoreError], says: str) -> None:
    with pytest.raises(error, match=says):
        read(host + path, config=replace(LIMITS, image_hosts="127.0.0.1"))


def test_a_host_that_does_not_answer_is_said() -> None:
    with pytest.raises(InvalidImageError, match="could not be fetched"):
        read("http://127.0.0.1:1/x.png", config=replace(LIMITS, image_hosts="127.0.0.1"))
