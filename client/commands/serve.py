"""`wicore serve`: Triton on a built model repository, watched."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.commands.options import DEFAULT_REPOSITORY, AsJson, Repository
from client.commands.terminal import Status, command, emit, say
from python_backends.errors import ServerUnavailableError

if TYPE_CHECKING:
    from client.server import Server, ServerOptions

MAX_RESTARTS = 5
RESTART_WINDOW_S = 600.0


@command
def serve(
    *,
    repository: Repository = DEFAULT_REPOSITORY,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 serves the network: there is no authentication.")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="HTTP API; 0 picks a free port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC API; 0 picks a free port.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Prometheus metrics; 0 picks a free port.")] = 8002,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="WICORE_ADMIN_KEY",
            help="Opens the admin APIs (model repository, shared memory, logging, trace) to requests with the header "
            "wicore-admin-key: KEY. [default: shut]",
        ),
    ] = None,
    response_cache_mb: Annotated[int, typer.Option(min=1, help="Memory for image embeddings seen before, MiB.")] = 256,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that answers in flight get after a stop.")] = 5,
    restart: Annotated[bool, typer.Option("--restart", help="Start again when a process of the server dies.")] = False,
    log: Annotated[Path | None, typer.Option(help="File for the server's log. [default: in the cache folder]")] = None,
    model_config_name: Annotated[
        str | None, typer.Option(help="Triton's alternative configurations, configs/NAME.pbtxt of each model.")
    ] = None,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="Show the log; twice: with details.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Serve a model repository from NVIDIA Triton until Ctrl-C.

    Triton comes from PATH (NVIDIA's container) or from the installed wheel. Admin APIs are shut and only this machine
    can connect unless options say otherwise. With --json one line with the addresses tells that the server is ready.

    wicore build google/gemma-3-1b-it && wicore serve

    wicore serve --http-port 0 --grpc-port 0 --metrics-port 0 --json
    """
    from client.server import ServerOptions

    chosen = ServerOptions(
        repository,
        host,
        http_port,
        grpc_port,
        metrics_port,
        response_cache_mb=response_cache_mb,
        drain_s=drain,
        log_path=log,
        log_verbose=max(0, verbose - 1),
        model_config_name=model_config_name,
    )
    if admin_key:
        chosen = dataclasses.replace(chosen, admin_key=admin_key)
    restarts: list[float] = []
    while True:
        try:
            _serve_once(chosen, show_log=bool(verbose), as_json=as_json)
        except ServerUnavailableError as error:
            now = time.monotonic()
            restarts = [*(at for at in restarts if now - at < RESTART_WINDOW_S), now]
            if not restart or len(restarts) > MAX_RESTARTS:
                raise
            say(f"{error.message}; starting again")


@command
def env() -> None:
    """Print what plain `tritonserver` needs around it here, for a shell to take.

    eval "$(wicore env)" && tritonserver --model-repository model_repository $TRITON_FLAGS

    In NVIDIA's container it needs nothing, and TRITON_FLAGS is empty.
    """
    import shlex

    from client.server.installation import find

    found = find()
    variables = {name: found.environment().get(name, "") for name in ("PATH", "LD_LIBRARY_PATH")}
    variables["PATH"] = f"{found.binary.parent}:{variables['PATH']}"
    flags = {"backend-directory": found.backends, "cache-directory": found.caches}
    variables["TRITON_FLAGS"] = " ".join(f"--{flag}={value}" for flag, value in flags.items() if value)
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")


def _serve_once(options: ServerOptions, *, show_log: bool, as_json: bool) -> None:
    """Serve until a signal or a death.

    Raises:
        ServerUnavailableError: a process of the server has died.
    """
    from client.server import Server

    status = Status()
    with Server(options, status, say if show_log else None) as server:
        status.clear()
        if as_json:
            emit(ready_line(server))
        else:
            say(f"Serving {options.repository} on {server.addresses.http} (HTTP) and {server.addresses.grpc} (gRPC)")
            say(f"Metrics: {server.addresses.metrics}   Log: {server.log_path}   Ctrl-C stops.")
        try:
            server.wait()
        finally:
            status("stopping …")
    status.clear()


def ready_line(server: Server) -> dict[str, object]:
    """What scripts need of a server that is ready."""
    return {
        "event": "ready",
        "http": server.addresses.http,
        "grpc": server.addresses.grpc,
        "metrics": server.addresses.metrics,
        "pid": server.pid,
        "log": str(server.log_path),
    }
