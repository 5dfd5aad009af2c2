"""`wicore serve`: Triton on a built model repository and the gateway in front of it, watched."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.commands.options import DEFAULT_REPOSITORY, AsJson, ConfigFile
from client.commands.terminal import Status, command, emit, say
from client.server.launcher import SECRET_VARIABLE
from python_backends.errors import ConfigError, WiCoreError

if TYPE_CHECKING:
    from client.gateway.settings import GatewaySettings
    from client.server import Server, ServerOptions, Supervisor
    from python_backends.config import Config


@command
def serve(
    *,
    repository: Annotated[
        Path | None,
        typer.Option(
            help="Model repository, as `wicore build` fills it. [default: the configuration's model_path, else "
            f"{DEFAULT_REPOSITORY}]",
            show_default=False,
        ),
    ] = None,
    config: ConfigFile = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 serves the network: there is no authentication.")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="HTTP API; 0 picks a free port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC API; 0 picks a free port.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Prometheus metrics; 0 picks a free port.")] = 8002,
    metrics_host: Annotated[
        str | None, typer.Option(help="Address of Triton's metrics, for a Prometheus elsewhere. [default: --host]")
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with a key that opens the admin APIs (model repository, shared memory, logging, trace) to "
            "requests with the header wicore-admin-key: KEY. [default: the variable WICORE_ADMIN_KEY, else shut]",
            show_default=False,
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
    drain: Annotated[
        int | None, typer.Option(min=0, help="Seconds that answers in flight get after a stop. [default: drain_s, 30]")
    ] = None,
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

    wicore serve --config wicore.json

    WICORE_MAX_BATCH_SIZE=4 wicore serve --http-port 0 --grpc-port 0 --metrics-port 0 --json

    The configuration is the file that --config names, or wicore.json in the repository; variables WICORE_… go before
    it, options before both. docs/configuration.md describes every key.
    """
    from client.server import ServerOptions

    repository, settings = read_settings(repository, config)
    if drain is not None:
        settings = dataclasses.replace(settings, drain_s=drain)
    chosen = ServerOptions(
        repository,
        host,
        http_port,
        grpc_port,
        metrics_port,
        metrics_host=metrics_host,
        response_cache_mb=response_cache_mb,
        drain_s=settings.drain_s,
        log_path=log,
        log_verbose=max(0, verbose - 1),
        model_config_name=model_config_name,
        config=settings,
    )
    chosen = dataclasses.replace(chosen, admin_key=read_admin_key(admin_key_file))
    front = gateway_settings(repository, settings, gateway_host or host, gateway_port) if gateway else None
    serve_until_signal(chosen, front, restart=restart, show_log=bool(verbose), as_json=as_json)


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


def read_settings(repository: Path | None, file: Path | None) -> tuple[Path, Config]:
    """The repository to serve and the configuration, from an option, a file and the environment.

    Raises:
        ConfigError: as `config.load`; also a ``model_path`` that is no model repository, and a build in another
            precision than ``trt_precision``.
    """
    from python_backends import config, manifest, tracing

    settings = config.load_file(file) if file else config.load(repository or DEFAULT_REPOSITORY)
    tracing.check(settings)
    if repository is None and settings.model_path:
        repository = Path(settings.model_path).expanduser()
        if not repository.is_absolute() and file is not None:
            repository = file.parent / repository
        if not repository.is_dir() or (repository / "config.json").exists():
            raise ConfigError(
                f"model_path {settings.model_path!r} is no built model repository; `wicore up --config` takes a "
                "checkpoint's folder or hub id and builds it first, or name a repository with --repository"
            )
    repository = repository or DEFAULT_REPOSITORY
    if (repository / manifest.MANIFEST_NAME).exists():
        built = manifest.read(repository)
        wanted = settings.trt_precision
        if built.runtime.startswith("tensorrt") and wanted not in ("auto", built.precision):
            raise ConfigError(
                f"trt_precision is {wanted} and {repository} was built in {built.precision}; build it anew, or leave "
                "trt_precision out"
            )
    return repository, settings


def read_admin_key(file: Path | None) -> str:
    """The key, from a file or the environment: an option's value would be in the process list. Empty for none.

    Raises:
        ConfigError: the file cannot be read, or holds what no header can.
    """
    try:
        key = os.environ.get(SECRET_VARIABLE, "") if file is None else file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the admin key cannot be read from {file}: {error}") from error
    if file is not None and not key:
        raise ConfigError(f"{file} holds no admin key")
    if not re.fullmatch(r"[A-Za-z0-9_.~-]*", key):
        raise ConfigError("the admin key may have letters, digits, and _ . ~ -")
    return key


def gateway_settings(repository: Path, settings: Config, host: str, port: int | None) -> GatewaySettings | None:
    """Settings of the gateway; None for a repository without a model of WiCore's.

    Raises:
        ArtifactError: the manifest cannot be used.
    """
    from client.gateway.settings import GatewaySettings
    from python_backends import manifest

    if not (repository / manifest.MANIFEST_NAME).exists():
        return None
    built = manifest.read(repository)
    return GatewaySettings(
        repository.resolve(),
        built.name,
        created=int((repository / manifest.MANIFEST_NAME).stat().st_mtime),
        max_model_len=min(settings.max_context_length, built.model.max_context_length),
        host=host,
        port=settings.server_port if port is None else port,
        config=settings,
    )


def serve_until_signal(
    options: ServerOptions, gateway: GatewaySettings | None, *, restart: bool, show_log: bool, as_json: bool
) -> None:
    """Serve until a signal, or a death that is the last word.

    Raises:
        ServerUnavailableError: a process of the server has died.
    """
    from client.server import Supervisor

    status = Status()
    tell = teller(options.config)

    def on_restart(died: str) -> None:
        if died:
            tell(f"{died}; starting again")
        elif as_json:
            emit(ready_line(running.server, running))
        else:
            tell("Serving again.")

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
            _introduce(running, tell)
        try:
            running.run()
        finally:
            status("stopping …")
    status.clear()


def teller(config: Config | None) -> Callable[[str], None]:
    """What tells a person, or whoever collects the logs, of the server: on standard error, in the logs' format."""
    if config is None or config.log_format == "text":
        return say
    import logging

    from python_backends import logs

    logs.start("serve", config.log_format)
    return logging.getLogger("wicore.serve").info


def _introduce(running: Supervisor, say: Callable[[str], None]) -> None:
    at = running.server.addresses
    say(f"Serving {running.server.options.repository} on {at.http} (HTTP) and {at.grpc} (gRPC)")
    if running.gateway:
        say(f"Gateway: {running.gateway.address} (a page to try it on) and {running.gateway.address}/v1 (OpenAI's API)")
    for line in sizes(running.server):
        say(line)
    say(f"Metrics: {at.metrics}   Log: {running.server.log_path}   Ctrl-C stops.")


def sizes(server: Server) -> list[str]:
    """What the model and the machine left of the sizes that were asked for."""
    from client.commands.stats import read_stats, size

    config = server.options.config
    try:
        found = read_stats(server.addresses.grpc) if config else {}
    except WiCoreError:
        return []  # a repository without WiCore's decoder
    if config is None or not found:
        return []
    pairs = (
        ("sequences at once", found["slots"], config.max_batch_size),
        ("tokens each", found["max_context_length"], config.max_context_length),
    )
    lines = [
        ", ".join(f"{got:,} {what}" + (f" (asked: {asked:,})" if got < asked else "") for what, got, asked in pairs)
    ]
    tiers = (found.get("kv_cache") or {}).get("tiers", {})
    kept = ", ".join(f"{tier} {size(held['usable_bytes'])}" for tier, held in tiers.items())
    lines += [f"kept KV {kept}"] if kept else []
    return [f"Sizes: {line}" for line in lines]


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
