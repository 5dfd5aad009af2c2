"""What stops a real repository from being served is said with the way out; Ctrl-C at any moment leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from client.server import Server
from python_backends import manifest
from python_backends.errors import ServerStartError
from tests.server.conftest import options_for


@pytest.fixture
def copied(repository: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(repository, tmp_path / "model_repository"))


def failure(repository: Path) -> str:
    server = Server(options_for(repository))
    with pytest.raises(ServerStartError) as caught:
        server.start()
    server.log_path.unlink(missing_ok=True)
    assert "Traceback" not in caught.value.message
    return caught.value.message


def test_a_repository_that_was_not_built(copied: Path) -> None:
    (copied / manifest.MANIFEST_NAME).unlink()
    assert "wicore build CHECKPOINT" in failure(copied)


@pytest.mark.parametrize("how", ["missing", "truncated", "corrupt"])
def test_a_damaged_artefact_is_named_once_with_the_way_out(copied: Path, how: str) -> None:
    weights = max((copied / "decoder").rglob("*"), key=lambda path: path.stat().st_size)
    if how == "missing":
        weights.unlink()
    elif how == "truncated":
        os.truncate(weights, weights.stat().st_size - 1)
    else:
        with weights.open("r+b") as file:
            file.seek(weights.stat().st_size // 2)
            file.write(b"\xff\x00" * 8)
    message = failure(copied)
    assert "did not load" in message
    assert message.count(weights.name) == 1
    assert "wicore build" in message


def test_a_wrong_key_in_the_configuration_is_named(copied: Path) -> None:
    (copied / "wicore.json").write_text(json.dumps({"max_bach_size": 4}), encoding="utf-8")
    assert "max_batch_size" in failure(copied)


def test_plain_tritonserver_loads_the_repository(repository: Path) -> None:
    """No WiCore around it: the flags of the README, the configurations completed by Triton itself."""
    from client.server import installation, ports

    installed = installation.find()
    addresses = ports.choose(options_for(repository))
    flags = {
        "model-repository": repository,
        "http-port": addresses.http_port,
        "grpc-port": addresses.grpc_port,
        "metrics-port": addresses.metrics_port,
        "backend-directory": installed.backends,
        "cache-directory": installed.caches,
        "cache-config": "local,size=16777216",
        "exit-timeout-secs": 2,
    }
    command = [str(installed.binary), *(f"--{name}={value}" for name, value in flags.items() if value)]
    with subprocess.Popen(
        command, env=installed.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as triton:
        try:
            body = '{"text_input": "Hi", "max_tokens": 2, "ignore_eos": true}'
            url = f"{addresses.http}/v2/models/gemma3/generate"
            curl = [
                "curl",
                "-s",
                "--fail",
                "--retry",
                "60",
                "--retry-delay",
                "1",
                "--retry-connrefused",
                "-d",
                body,
                url,
            ]
            done = subprocess.run(curl, capture_output=True, text=True, timeout=90, check=True)
            assert len(json.loads(done.stdout)["token_ids"]) == 2
        finally:
            triton.terminate()


def demo(folder: Path, *more: str) -> list[str]:
    options = ["--repository", str(folder / "model_repository"), "--json", *more]
    return [sys.executable, "-m", "client.cli", "demo", "run", *options]


def left_by(folder: Path) -> list[str]:
    """Command lines of processes that name the folder."""
    return [
        " ".join(process.info["cmdline"])
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] and any(str(folder) in part for part in process.info["cmdline"])
    ]


def test_the_demo_answers_rightly_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(demo(tmp_path), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["right"] is True
    assert Path(answer["picture"]).is_file()
    assert left_by(tmp_path) == []
    begin = time.monotonic()
    again = subprocess.run(demo(tmp_path, "--lang", "zh"), capture_output=True, text=True, timeout=240, check=False)
    assert time.monotonic() - begin < 20
    assert json.loads(again.stdout)["right"] is True
    assert "up to date" in again.stderr


@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.0, 2.0, 2.5, 3.0, 4.0])
def test_ctrl_c_at_any_moment_leaves_nothing(tmp_path: Path, seconds: float) -> None:
    with subprocess.Popen(demo(tmp_path, "--keep"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        code = process.wait(30)
        assert process.stderr is not None
        said = process.stderr.read()
    # While it still imports, it ends by the signal itself, which a shell shows as 130 too.
    assert code == 130 or (code == -signal.SIGINT and b"Repository" not in said)
    assert b"Traceback" not in said
    assert left_by(tmp_path) == []
    assert not list(Path("/dev/shm").glob(f"wicore-{process.pid}-*"))
