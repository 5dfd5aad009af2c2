"""The gateway's process: started beside tritonserver, watched, drained."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from client.server import launcher
from client.server.installation import cache_folder
from client.server.options import reachable
from python_backends.errors import ServerStartError, ServerUnavailableError

if TYPE_CHECKING:
    from client.gateway.settings import GatewaySettings

START_TIMEOUT_S = 60.0
KILL_GRACE_S = 5.0


class Gateway:
    """A running gateway. Start it from the thread that stays: the kernel ends it with that thread."""

    def __init__(self, settings: GatewaySettings, log_path: Path | None = None) -> None:
        """``log_path``: added to; a file in the cache folder, removed after a clean stop, where None."""
        self.settings = settings
        self.log_path = log_path or cache_folder() / "logs" / f"gateway-{secrets.token_hex(4)}.log"
        self._keeps_log = log_path is not None
        self._process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        """URL."""
        return f"http://{reachable(self.settings.host)}:{self.settings.port}"

    @property
    def pid(self) -> int | None:
        """Process ID; None where none runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start, and return when it listens; port 0 has become the one it found, also for another start.

        Raises:
            ServerStartError: with the reason.
        """
        command = [sys.executable, "-I", "-S", launcher.__file__, str(os.getpid())]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, sys.executable, "-m", "client.gateway.server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # a terminal's Ctrl-C is ours to forward
                env=_environment(),
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
                pipe.write(self.settings.to_json() + "\n")
            told = _first_line(self._process.stdout)
        except BaseException:
            self.kill()
            raise
        if told.get("event") != "listening":
            self.kill()
            reason = told.get("message", "the gateway did not start")
            raise ServerStartError(f"{reason} (log: {self.log_path})")
        self.settings = replace(self.settings, port=int(told["port"]))

    def check(self) -> None:
        """Raises ServerUnavailableError where the process has ended."""
        if self._process is None or self._process.poll() is not None:
            code = None if self._process is None else self._process.returncode
            raise ServerUnavailableError(f"the gateway has died (exit code {code}; log: {self.log_path})")

    def stop(self) -> None:
        """Let answers in flight end within the settings' drain time, then end it. Safe to call again."""
        if self._process is None:
            return
        clean = False
        try:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                clean = self._process.wait(self.settings.config.drain_s + KILL_GRACE_S) == 0
        finally:
            self.kill()
        if clean and not self._keeps_log:
            self.log_path.unlink(missing_ok=True)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdout:
                self._process.stdout.close()
            self._process = None


def _environment() -> dict[str, str]:
    """So that a checkout that is not installed finds its packages too."""
    root = str(Path(__file__).resolve().parents[2])
    found = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, found]))}


def _first_line(pipe: IO[str]) -> dict[str, str]:
    """What the process says first; empty where it says nothing."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if select.select([pipe], [], [], 0.1)[0]:
            line = pipe.readline()
            found: dict[str, str] = json.loads(line) if line else {}
            return found
    return {}
