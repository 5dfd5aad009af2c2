"""Every command of the READMEs runs, in the order they stand, and does what they say."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.paths import ROOT

READMES = ("README.md", "README.zh-CN.md")
START_S = 120


def blocks(readme: str, language: str) -> list[str]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Shell:
    """bash in a folder that looks like a fresh clone, with ports that are free."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (".venv", "builders", "docs"):
            with contextlib.suppress(FileExistsError):
                (folder / name).symlink_to(ROOT / name)
        if not (ROOT / ".venv/bin/activate").exists():
            (folder / ".venv").unlink()
            (folder / ".venv").symlink_to(sys.prefix)
        self.http, self.grpc, self.gateway = free_port(), free_port(), free_port()

    def here(self, command: str) -> str:
        ports = {"8000": self.http, "8001": self.grpc, "8080": self.gateway}
        return re.sub(r"\b80(00|01|80)\b", lambda found: str(ports[found[0]]), command)

    def environment(self) -> dict[str, str]:
        extra = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "WICORE_ADDRESS": f"localhost:{self.grpc}",
        }
        return {**os.environ, **extra, "XDG_CACHE_HOME": str(self.folder / "cache")}

    def run(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.here(command)],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def background(self, command: str) -> Iterator[None]:
        """A server: yields when it is ready, stops it by Ctrl-C."""
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", self.here(command)],
            cwd=self.folder,
            env=self.environment(),
            start_new_session=True,
        )
        try:
            self._wait_ready(process)
            yield
        finally:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(30)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        self.wait_for(f"http://localhost:{self.http}/v2/health/ready", process)

    def wait_for(self, url: str, process: subprocess.Popen[bytes] | None = None) -> None:
        """Until it is answered with 200."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert process is None or process.poll() is None, "the server ended"
            with contextlib.suppress(OSError), urllib.request.urlopen(url):
                return
            time.sleep(0.2)
        raise AssertionError("the server was not ready in time")


def test_both_readmes_give_the_same_commands():
    for language in ("bash", "python"):
        stripped = [[re.sub(r" +#.*", "", block) for block in blocks(readme, language)] for readme in READMES]
        assert stripped[0] == stripped[1]


def test_the_first_two_commands_exist_and_the_demo_runs():
    first = blocks("README.md", "bash")[0]
    assert re.findall(r"^make (\w+)", first, flags=re.MULTILINE) == ["demo", "test"]
    subprocess.run(["make", "-n", "test"], cwd=ROOT, check=True, capture_output=True)
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "right" in done.stdout + done.stderr


def test_serving_asking_curl_and_python(tmp_path):
    shell = Shell(tmp_path)
    _, serve, ask, curl, help_, gpu, plain = blocks("README.md", "bash")
    *before, server = serve.strip().splitlines()
    shell.run("\n".join(before))
    activate = before[0]
    with shell.background(f"{activate}\nexec {server} --metrics-port 0 --gateway-port 8080"):
        shell.wait_for(f"http://localhost:{shell.gateway}/health/ready")
        assert len(shell.run(f"{activate}\n{ask}").splitlines()) > 3
        answered = shell.run(curl)
        assert answered.count('"text_output"') > 1
        assert '"object":"chat.completion"' in answered.replace(" ", "")
        (script,) = blocks("README.md", "python")
        done = subprocess.run(
            [sys.executable, "-c", shell.here(script)], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip()
    assert "checkpoint" in shell.run(f"{activate}\n{help_}").lower()
    shell.run(f"{activate}\n{gpu}")
    assert (tmp_path / "gpu_repository/manifest.json").exists()
    *before, server = plain.strip().splitlines()
    ports = f"--http-port {shell.http} --grpc-port {shell.grpc} --metrics-port {free_port()}"
    with shell.background("\n".join([activate, *before, f"exec {server} {ports}"])):
        assert '"text_output"' in shell.run(curl.partition("curl -s localhost:8080")[0])  # no gateway here
