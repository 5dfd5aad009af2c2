"""Under `wicore serve` whatever is killed is served again, and an end loses no answer that was begun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from client import Client
from tests.server.gateway.serving import (
    CHAT,
    RECOVERY_S,
    events_of,
    wait_until_answered,
    wait_until_idle,
    wait_until_ready,
    wicore_serve,
)
from tests.server.test_serve import left_by


def pid_of(victim: str, ready: dict[str, Any]) -> int:
    """Of a process of the server that said to be ready."""
    if victim in ("gateway", "tritonserver"):
        return int(ready["gateway_pid" if victim == "gateway" else "pid"])
    stages = psutil.Process(ready["pid"]).children()
    return next(stage.pid for stage in stages if f"/{victim}/" in stage.cmdline()[1])


def after_a_kill(victim: str, ready: dict[str, Any], process: subprocess.Popen[str]) -> dict[str, Any]:
    """Kill one process while a stream is open; what the server says when it is ready again."""
    address, pid = ready["gateway"], pid_of(victim, ready)

    def kill() -> None:
        os.kill(pid, signal.SIGKILL)

    if victim == "gateway":
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            events_of(address, kill)
    else:
        assert events_of(address, kill)[-1]["error"]["code"] == "server_unavailable"
    killed = time.monotonic()
    assert wait_until_answered(address) <= {503}
    wait_until_ready(address, killed + RECOVERY_S - time.monotonic())
    wait_until_idle(address)  # also of what a killed gateway had asked for
    assert process.stdout is not None
    again: dict[str, Any] = json.loads(process.stdout.readline())
    return again


@pytest.mark.parametrize(
    "victims",
    [("gateway", "tokenizer", "decoder"), ("tritonserver", "image_processor", "vision_encoder", "gateway")],
    ids=" ".join,
)
def test_whatever_is_killed_fails_its_streams_clearly_and_serves_again(
    repository: Path, victims: tuple[str, ...]
) -> None:
    left_before = set(left_by(repository))
    with wicore_serve(repository) as (process, ready):
        states = [ready]
        for victim in victims:
            states.append(after_a_kill(victim, states[-1], process))
            before, after = states[-2:]
            changed = {name for name in after if after[name] != before[name]} - {"log"}
            assert changed == {"gateway_pid" if victim == "gateway" else "pid"}
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert set(left_by(repository)) <= left_before


class Callers:
    """Clients that ask all the time until they are refused, over HTTP and over gRPC."""

    def __init__(self, address: str, grpc: str) -> None:
        self.statuses: list[int] = []
        self.broken: list[str] = []
        self._address, self._grpc = address, grpc
        asks = [self._whole] * 3 + [self._streamed] * 3 + [self._direct] * 2
        self._threads = [threading.Thread(target=ask, args=(seed,)) for seed, ask in enumerate(asks)]
        for thread in self._threads:
            thread.start()

    def wait_for(self, answers: int) -> None:
        """Until so many have come, and as many callers as ever wait for their next one."""
        deadline = time.monotonic() + 60
        while self.statuses.count(200) < answers:
            assert time.monotonic() < deadline, "there is no load"
            time.sleep(0.02)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _ask(self, seed: int, stream: bool) -> bool:
        """Whether it was answered; an answer that was begun must be whole."""
        body = {
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 300,
            "ignore_eos": True,
            "temperature": 5.0,
            "seed": seed,
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        }
        try:
            with httpx.stream("POST", self._address + CHAT, json=body, timeout=60) as answer:
                self.statuses.append(answer.status_code)
                text = answer.read().decode()
        except httpx.ConnectError:
            return False
        if answer.status_code != 200:
            return False
        events = [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]
        last = events[-1] if stream else json.loads(text)
        if (stream and not text.endswith("[DONE]\n\n")) or last["usage"]["completion_tokens"] != 300:
            self.broken.append(text)
        return True

    def _whole(self, seed: int) -> None:
        while self._ask(seed, False):
            pass

    def _streamed(self, seed: int) -> None:
        while self._ask(seed, True):
            pass

    def _direct(self, seed: int) -> None:
        """One answer, over Triton's own port, that is long under way when the end comes."""
        with Client(self._grpc, timeout_s=60) as client:
            answer = client.generate("Hi", max_tokens=1500, ignore_eos=True, temperature=5.0, seed=seed)
        if len(answer.token_ids) != 1500:
            self.broken.append(answer.text)


def test_a_signal_under_load_loses_no_request_that_was_accepted(repository: Path) -> None:
    with wicore_serve(repository, "--drain", "60") as (process, ready):
        callers = Callers(ready["gateway"], ready["grpc"])
        callers.wait_for(8)
        process.terminate()
        assert process.wait(90) == 128 + signal.SIGTERM
        callers.join()
    assert callers.broken == []
    assert set(callers.statuses) <= {200, 503}
