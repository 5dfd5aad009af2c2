"""`wicore serve` as its users start it, and what they see of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

RECOVERY_S = 10
CHAT = "/v1/chat/completions"
SHORT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
LONG: dict[str, Any] = {
    **SHORT,
    "max_tokens": 5000,
    "ignore_eos": True,
    "n": 8,
    "temperature": 5.0,  # nothing repeats itself, so that no draft is right
    "stream": True,
}


@contextmanager
def wicore_serve(repository: Path, *more: str, **popen: Any) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command, and what it says when it is ready."""
    ports = [option for name in ("http", "grpc", "metrics", "gateway") for option in (f"--{name}-port", "0")]
    command = [sys.executable, "-m", "client.cli", "serve", "--repository", str(repository), "--json", *ports, *more]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **{**quiet, **popen}) as process:
        assert process.stdout is not None
        try:
            yield process, json.loads(process.stdout.readline())
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(60)


def wait_until_ready(address: str, timeout_s: float = RECOVERY_S) -> None:
    """Until every stage has done a little work."""
    _wait(lambda: httpx.get(f"{address}/health/ready", timeout=10).status_code == 200, timeout_s)


def wait_until_answered(address: str, timeout_s: float = RECOVERY_S) -> set[int]:
    """Ask again and again until there is an answer; the statuses of what was refused meanwhile."""
    refused: set[int] = set()

    def answered() -> bool:
        status = httpx.post(address + CHAT, json=SHORT, timeout=timeout_s).status_code
        refused.update({status} - {200})
        return status == 200

    _wait(answered, timeout_s)
    return refused


def wait_until_idle(address: str, timeout_s: float = 3) -> None:
    """Until no sequence is left in the engine behind a gateway."""

    def idle() -> bool:
        state = httpx.get(f"{address}/v1/stats", timeout=10).raise_for_status().json()
        return bool(state["batch"]["running"] + state["queue"]["waiting"] == 0)

    _wait(idle, timeout_s)


def _wait(is_done: Callable[[], bool], timeout_s: float) -> None:
    begin = time.monotonic()
    while time.monotonic() - begin < timeout_s:
        try:
            if is_done():
                return
        except httpx.ConnectError:
            pass  # nothing listens
        except (httpx.ReadError, httpx.RemoteProtocolError):
            pass  # it died meanwhile
        time.sleep(0.05)
    raise AssertionError(f"not again within {timeout_s} s")


def events_of(address: str, after_first: Callable[[], object]) -> list[dict[str, Any]]:
    """Of a long stream; ``after_first`` is called once it has begun.

    Raises:
        httpx.RemoteProtocolError: the stream broke off without its end.
    """
    with httpx.stream("POST", address + CHAT, json=LONG, timeout=RECOVERY_S) as answer:
        lines = answer.iter_lines()
        next(lines)
        after_first()
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]
