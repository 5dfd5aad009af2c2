"""Hub ids: downloads over a real connection to a small hub of our own, and what users read when one cannot work."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from builders.hub import resolve
from python_backends.errors import BuildError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"model_type": "gemma3_text"}', "model.safetensors": bytes(1000), "README.md": b"not needed"}
REFUSALS = {"org/gated": (403, "GatedRepo"), "org/private": (401, "RepoNotFound")}


class Hub(BaseHTTPRequestHandler):
    """The calls that a download makes, for one model: org/tiny."""

    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.seen.append(path)
        model, _, rest = path.removeprefix("/api/models").lstrip("/").partition("/revision/")
        model = "/".join(model.split("/")[:2])
        if model in REFUSALS:
            status, code = REFUSALS[model]
            self._send(status, b"{}", {"X-Error-Code": code}, with_body)
        elif model != "org/tiny":
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        elif rest and rest not in {"main", COMMIT}:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        elif "/resolve/" in path:
            content = FILES[path.rpartition("/")[2]]
            etag = hashlib.sha256(content).hexdigest()
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, with_body)
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in FILES.items()
            ]
            self._send(200, json.dumps(tree).encode(), {}, with_body)
        else:
            siblings = [{"rfilename": name} for name in FILES]
            self._send(200, json.dumps({"id": model, "sha": COMMIT, "siblings": siblings}).encode(), {}, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


CHILD = """
import sys
from builders.hub import resolve
from python_backends.errors import BuildError
try:
    print(resolve(sys.argv[1], sys.argv[2] or None))
except BuildError as error:
    print(error)
"""


def _resolve(hub_id: str, endpoint: str, cache: Path, revision: str = "", **environment: str) -> str:
    """What a fresh process finds; huggingface_hub reads its environment when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, hub_id, revision],
        env={"PATH": "/usr/bin", "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_a_model_is_downloaded_once_without_what_a_build_does_not_need(hub: str, tmp_path: Path) -> None:
    folder = Path(_resolve("org/tiny", hub, tmp_path))
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    asked = len(Hub.seen)
    assert Path(_resolve("org/tiny", hub, tmp_path, HF_HUB_OFFLINE="1")) == folder
    assert len(Hub.seen) == asked


@pytest.mark.parametrize(
    ("hub_id", "revision", "message"),
    [
        ("org/gated", "", "org/gated is gated: accept its licence"),
        ("org/private", "", "org/private is not known to the hub"),
        ("org/unknown", "", "org/unknown is not known to the hub"),
        ("org/tiny", "v9", "org/tiny has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses_is_said_in_plain_words(
    hub: str, tmp_path: Path, hub_id: str, revision: str, message: str
) -> None:
    assert message in _resolve(hub_id, hub, tmp_path, revision)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_a_connection_the_message_offers_a_way(tmp_path: Path, offline: str) -> None:
    said = _resolve("org/tiny", "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE=offline)
    assert "org/tiny is no folder here, not in the download cache, and the hub cannot be reached" in said


def test_an_existing_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/tiny") == Path("org/tiny")
    with pytest.raises(BuildError, match="leave --revision out"):
        resolve("org/tiny", "main")


@pytest.mark.parametrize("source", ["missing", "./org/tiny", "/a/b", "a/b/c", "org/", "org/ty ny"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_never_looked_up(source: str) -> None:
    with pytest.raises(BuildError, match="does not exist; pass the folder"):
        resolve(source)
