"""Starting, watching and stopping a real tritonserver with models of a few lines."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from client.server import Server, ServerOptions
from client.server.options import ADMIN_HEADER
from client.server.process import SHARED_MEMORY
from python_backends.errors import ServerStartError, ServerUnavailableError
from tests.client.server.repositories import CONFIG, FAILING, add_counter, add_model


@pytest.fixture
def options(tmp_path: Path) -> ServerOptions:
    repository = tmp_path / "repository"
    repository.mkdir()
    return ServerOptions(repository, http_port=0, grpc_port=0, metrics_port=0, response_cache_mb=8, drain_s=2)


@pytest.fixture
def counter(options: ServerOptions) -> Iterator[Server]:
    add_counter(options.repository)
    with Server(options) as server:
        yield server


def get(url: str, *, post: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, post, headers or {}), timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def processes_of(server: Server) -> list[psutil.Process]:
    assert server.pid
    root = psutil.Process(server.pid)
    return [root, *root.children(recursive=True)]


def leftovers(processes: list[psutil.Process]) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(processes, timeout=5)
    return alive


def regions_of(server: Server) -> list[str]:
    return [path.name for path in SHARED_MEMORY.glob("wicore-*") if path.name.startswith(server._shm_prefix)]


def test_a_started_server_answers_and_a_stopped_one_leaves_nothing(counter: Server) -> None:
    status, body = get(f"{counter.addresses.http}/v2/models/counter/generate_stream", post=b'{"number": 5}')
    assert status == 200
    assert [json.loads(line[6:])["next"] for line in body.decode().splitlines() if line] == [5, 6, 7]
    assert get(counter.addresses.metrics)[0] == 200
    processes, regions = processes_of(counter), regions_of(counter)
    assert len(processes) == 2
    assert regions
    counter.stop()
    assert leftovers(processes) == []
    assert regions_of(counter) == []
    assert not counter.log_path.exists()


def test_only_loopback_listens_and_admin_apis_are_shut(counter: Server) -> None:
    assert counter.pid
    listening = [one.laddr.ip for one in psutil.Process(counter.pid).net_connections() if one.status == "LISTEN"]
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
    index = f"{counter.addresses.http}/v2/repository/index"
    shut = ["/v2/logging", "/v2/trace/setting", "/v2/systemsharedmemory/status"]
    assert get(index, post=b"")[0] == 403
    assert [get(counter.addresses.http + path)[0] for path in shut] == [403] * 3
    (shown,) = [part for part in psutil.Process(counter.pid).cmdline() if "restricted-api" in part]
    assert get(index, post=b"", headers={ADMIN_HEADER: shown.rpartition("=")[2].strip()})[0] == 403


def test_a_key_opens_the_admin_apis_and_is_not_in_the_process_list(options: ServerOptions) -> None:
    secret = "a-key-that-nobody-may-read"
    add_counter(options.repository)
    with Server(dataclasses.replace(options, admin_key=secret)) as counter:
        index = f"{counter.addresses.http}/v2/repository/index"
        key = {ADMIN_HEADER: secret}
        assert get(index, post=b"")[0] == get(index, post=b"", headers={ADMIN_HEADER: "*" * len(secret)})[0] == 403
        assert get(index, post=b"", headers=key)[0] == 200
        processes = processes_of(counter)
        assert secret not in " ".join(part for process in processes for part in process.cmdline())
        assert all(secret not in process.environ().values() for process in processes)
        assert secret not in counter.log_path.read_text(encoding="utf-8")
        check_that_nothing_unloads(counter, key)


def check_that_nothing_unloads(counter: Server, key: dict[str, str]) -> None:
    # Even with the key no model can be loaded or unloaded.
    status, body = get(f"{counter.addresses.http}/v2/repository/models/counter/unload", post=b"{}", headers=key)
    assert status != 200
    assert b"not allowed" in body


def test_two_servers_live_side_by_side(counter: Server) -> None:
    with Server(counter.options) as second:
        ports = [dataclasses.astuple(server.addresses)[1:] for server in (counter, second)]
        assert not set(ports[0]) & set(ports[1])
    status, _ = get(f"{counter.addresses.http}/v2/models/counter/generate_stream", post=b'{"number": 1}')
    assert status == 200
    assert regions_of(counter)


def test_a_killed_stage_is_noticed_named_and_cleaned_up(counter: Server) -> None:
    processes = processes_of(counter)
    processes[1].kill()
    begin = time.monotonic()
    with pytest.raises(ServerUnavailableError, match=r"stage counter has died, killed by SIGKILL"):
        counter.wait()
    assert time.monotonic() - begin < 2
    counter.stop()
    assert time.monotonic() - begin < 5
    assert leftovers(processes) == []
    assert regions_of(counter) == []


def test_a_killed_tritonserver_is_noticed_and_its_stages_end(counter: Server) -> None:
    processes = processes_of(counter)
    processes[0].kill()
    with pytest.raises(ServerUnavailableError, match="tritonserver ended, killed by SIGKILL"):
        counter.wait()
    counter.stop()
    assert leftovers(processes) == []
    assert regions_of(counter) == []


def test_the_server_ends_with_a_killed_parent(options: ServerOptions) -> None:
    add_counter(options.repository)
    code = (
        "import sys, time; from pathlib import Path; from client.server import *\n"
        "server = Server(ServerOptions(Path(sys.argv[1]), http_port=0, grpc_port=0, metrics_port=0)); server.start()\n"
        "print(server.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(options.repository)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        root = psutil.Process(int(parent.stdout.readline()))
        processes = [root, *root.children()]
        parent.kill()
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert alive == []


def test_a_taken_port_is_named_with_its_option(options: ServerOptions) -> None:
    add_counter(options.repository)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = Server(dataclasses.replace(options, grpc_port=port))
        with pytest.raises(ServerStartError, match=rf"port {port} .*--grpc-port PORT") as caught:
            server.start()
    assert f"process {os.getpid()}" in caught.value.message


@pytest.mark.parametrize("made", [False, True])
def test_an_empty_or_missing_repository_is_told_how_to_fill(options: ServerOptions, made: bool) -> None:
    folder = options.repository if made else options.repository / "nothing"
    with pytest.raises(ServerStartError, match="wicore build CHECKPOINT"):
        Server(dataclasses.replace(options, repository=folder)).start()


def test_a_stage_that_fails_is_named_with_its_own_words(options: ServerOptions) -> None:
    add_counter(options.repository)
    add_model(options.repository, "broken", FAILING)
    server = Server(options)
    with pytest.raises(ServerStartError, match=r"^server_start: broken did not load: weights\.bin is corrupt; run"):
        server.start()
    assert server.pid is None
    assert server.log_path.exists()
    server.log_path.unlink()


@pytest.mark.parametrize(
    ("code", "config", "match"),
    [
        ("import nowhere", CONFIG, "broken did not load: .*No module named 'nowhere'"),
        ("", CONFIG.replace("TYPE_INT32", "TYPE_INT33", 1), "broken"),
    ],
)
def test_other_failures_name_the_model_too(options: ServerOptions, code: str, config: str, match: str) -> None:
    add_model(options.repository, "broken", code, config)
    server = Server(options)
    with pytest.raises(ServerStartError, match=match):
        server.start()
    server.log_path.unlink()


def test_a_stop_drains_what_is_in_flight_and_is_bounded(options: ServerOptions) -> None:
    add_counter(options.repository, pieces=100_000)
    with Server(options) as server:
        address = ("127.0.0.1", server.addresses.http_port)
        with socket.create_connection(address, timeout=30) as connection:
            body = b'{"number": 1}'
            head = f"POST /v2/models/counter/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            assert connection.recv(1)
            begin = time.monotonic()
            server.stop()
    assert time.monotonic() - begin < options.drain_s + 7


def test_progress_names_what_is_loading(options: ServerOptions) -> None:
    add_counter(options.repository)
    heard: list[str] = []
    with Server(options, lambda progress: heard.append(str(progress))):
        assert heard == ["loading counter", "1 models ready"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_wicore_serve_ends_cleanly_on_a_signal(options: ServerOptions, number: signal.Signals) -> None:
    add_counter(options.repository)
    with serve(options.repository) as process:
        line = json.loads(process.stdout.readline())  # type: ignore[union-attr]
        assert line["event"] == "ready"
        root = psutil.Process(line["pid"])
        processes = [root, *root.children()]
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert leftovers(processes) == []


def test_wicore_serve_exits_with_an_error_when_a_stage_dies(options: ServerOptions) -> None:
    add_counter(options.repository)
    with serve(options.repository, "--no-restart") as process:
        root = psutil.Process(json.loads(process.stdout.readline())["pid"])  # type: ignore[union-attr]
        root.children()[0].kill()
        assert process.wait(20) == 1
        error = json.loads(process.stdout.readline())["error"]  # type: ignore[union-attr]
    assert error["code"] == "server_unavailable"
    assert "stage counter has died" in error["message"]


def test_wicore_serve_restart_serves_again(options: ServerOptions) -> None:
    add_counter(options.repository)
    with serve(options.repository) as process:
        first = json.loads(process.stdout.readline())  # type: ignore[union-attr]
        psutil.Process(first["pid"]).children()[0].kill()
        second = json.loads(process.stdout.readline())  # type: ignore[union-attr]
        assert second["pid"] != first["pid"]
        assert second["http"] == first["http"], "clients know the old port"
        assert get(f"{second['http']}/v2/health/ready")[0] == 200
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM


def serve(repository: Path, *more: str) -> subprocess.Popen[str]:
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "client.cli", "serve", "--repository", str(repository), "--json", *ports, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
