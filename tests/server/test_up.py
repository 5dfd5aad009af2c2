"""`wicore up`: from the checkpoint to an answer in one command, and again without building."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from builders.demo.evaluate import sample_picture
from python_backends import config, manifest
from tests.paths import DEMO_CHECKPOINT
from tests.server.gateway.test_openai_sdk import data_url
from tests.server.test_serve import left_by

PORTS = [option for name in ("http", "grpc", "metrics", "gateway") for option in (f"--{name}-port", "0")]


@contextmanager
def wicore_up(folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any], Path]]:
    """The command, what it says when it is ready, and what it told a person."""
    told = folder / "told"
    command = [sys.executable, "-m", "client.cli", "up", *more]
    options = ["--repository", str(folder / "model_repository"), "--json", *PORTS]
    with (
        told.open("w", encoding="utf-8") as errors,
        subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            yield process, json.loads(line) if line else {}, told
        finally:
            if process.poll() is None:
                process.kill()


def test_a_checkpoint_is_built_sized_served_and_answers_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    picture, question, right = sample_picture(1)
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 64}
    with wicore_up(tmp_path, str(DEMO_CHECKPOINT)) as (process, ready, _):
        answer = httpx.post(f"{ready['gateway']}/v1/chat/completions", json=body, timeout=60).json()
        stats = httpx.get(f"{ready['gateway']}/v1/stats").json()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert answer["choices"][0]["message"]["content"] == right
    built = manifest.load(tmp_path / "model_repository")
    assert (built.runtime, built.precision) == ("onnxruntime", "int8")
    written = json.loads((tmp_path / "model_repository" / config.CONFIG_NAME).read_text(encoding="utf-8"))
    assert set(written) == {"max_batch_size", "max_context_length", "cpu_memory_gb"}
    assert stats["batch"]["slots"] == written["max_batch_size"]
    assert left_by(tmp_path) == []

    changed = {**written, "max_batch_size": 2}
    (tmp_path / "model_repository" / config.CONFIG_NAME).write_text(json.dumps(changed), encoding="utf-8")
    begin = time.monotonic()
    with wicore_up(tmp_path, str(DEMO_CHECKPOINT), "--gateway-host", "127.0.0.2") as (process, ready, told):
        assert time.monotonic() - begin < 30
        assert ready["gateway"].startswith("http://127.0.0.2:")
        assert ready["http"].startswith("http://127.0.0.1:"), "Triton stays where it was"
        assert "up to date" in told.read_text(encoding="utf-8")
        assert httpx.get(f"{ready['gateway']}/v1/stats").json()["batch"]["slots"] == 2  # its owner's word counts
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("more", "says"),
    [([], "name a checkpoint"), (["no/such-folder-here/x"], "no/such-folder-here/x"), (["."], "config.json")],
)
def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path, more: list[str], says: str) -> None:
    with wicore_up(tmp_path, *more) as (process, told, _):
        assert process.wait(60) == 1
    assert says in told["error"]["message"]
    assert not (tmp_path / "model_repository").exists()
