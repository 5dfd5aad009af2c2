"""`wicore serve`: Triton on a built model repository and the gateway in front of it, watched."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.commands.options import DEFAULT_REPOSITORY, AsJson, Repository
from client.commands.terminal import Status, command, emit, say

if TYPE_CHECKING:
    from client.gateway.settings import GatewaySettings
    from client.server import Server, ServerOptions, Supervisor


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
    gateway: Annotated[
        bool, typer.Option("--gateway/--no-gateway", help="OpenAI's API, WiCore's own and a page, in front of Triton.")
    ] = True,
    gateway_host: Annotated[
        str | None,
        typer.Option(help="Address the gateway listens on; Triton can stay on this machine. [default: --host]"),
    ] = None,
    gateway_port: Annotated[
        int | None, typer.Option(help="The gateway's port; 0 picks a free one. [default: wicore.json, else 8080]")
    ] = None,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that answers in flight get after a stop.")] = 30,
    restart: Annotated[
        bool, typer.Option("--restart/--no-restart", help="Start again what dies of the server's processes.")
    ] = True,
    log: Annotated[Path | None, typer.Option(help="File for the server's log. [default: in the cache folder]")] = None,
    model_config_name: Annotated[
        str | None, typer.Option(help="Triton's alternative configurations, configs/NAME.pbtxt of each model.")
    ] = None,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="Show the log; twice: with details.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Serve a model repository from NVIDIA Triton, with the HTTP gateway in front, until Ctrl-C.

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
    front = _gateway_settings(repository, gateway_host or host, gateway_port, drain) if gateway else None
    _serve(chosen, front, restart=restart, show_log=bool(verbose), as_json=as_json)


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


def _gateway_settings(repository: Path, host: str, port: int | None, drain_s: int) -> GatewaySettings | None:
    """Settings of the gateway; None for a repository without a model of WiCore's.

    Raises:
        ArtifactError, ConfigError: the manifest or wicore.json cannot be used.
    """
    from client.gateway.settings import GatewaySettings
    from python_backends import config, manifest

    if not (repository / manifest.MANIFEST_NAME).exists():
        return None
    settings = config.load(repository)
    built = manifest.read(repository)
    return GatewaySettings(
        repository.resolve(),
        built.name,
        created=int((repository / manifest.MANIFEST_NAME).stat().st_mtime),
        max_model_len=min(settings.max_context_length, built.model.max_context_length),
        host=host,
        port=settings.server_port if port is None else port,
        config=settings,
        drain_s=drain_s,
    )


def _serve(
    options: ServerOptions, gateway: GatewaySettings | None, *, restart: bool, show_log: bool, as_json: bool
) -> None:
    """Serve until a signal, or a death that is the last word.

    Raises:
        ServerUnavailableError: a process of the server has died.
    """
    from client.server import Supervisor

    status = Status()

    def on_restart(died: str) -> None:
        if died:
            say(f"{died}; starting again")
        elif as_json:
            emit(ready_line(running.server, running))
        else:
            say("Serving again.")

    running = Supervisor(
        options,
        gateway,
        restart=restart,
        on_restart=on_restart,
        on_progress=status,
        on_log=say if show_log else None,
    )
    with running:
        status.clear()
        if as_json:
            emit(ready_line(running.server, running))
        else:
            _introduce(running)
        try:
            running.run()
        finally:
            status("stopping …")
    status.clear()


def _introduce(running: Supervisor) -> None:
    at = running.server.addresses
    say(f"Serving {running.server.options.repository} on {at.http} (HTTP) and {at.grpc} (gRPC)")
    if running.gateway:
        say(f"Gateway: {running.gateway.address}/v1 (OpenAI's API)")
    say(f"Metrics: {at.metrics}   Log: {running.server.log_path}   Ctrl-C stops.")


def ready_line(server: Server, supervisor: Supervisor | None = None) -> dict[str, object]:
    """What scripts need of a server that is ready."""
    gateway = supervisor.gateway if supervisor else None
    return {
        "event": "ready",
        "http": server.addresses.http,
        "grpc": server.addresses.grpc,
        "metrics": server.addresses.metrics,
        "pid": server.pid,
        "log": str(server.log_path),
        **({"gateway": gateway.address, "gateway_pid": gateway.pid} if gateway else {}),
    }
