"""`wicore up`: from a checkpoint to a server in one command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.commands.options import DEFAULT_REPOSITORY, AsJson, ConfigFile
from client.commands.serve import gateway_settings, serve_until_signal
from client.commands.terminal import Status, colour, command, emit, say
from python_backends.errors import ConfigError, ServerStartError

if TYPE_CHECKING:
    from builders.build import Result
    from client.sizing import Plan
    from python_backends.config import Config


@command
def up(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a Gemma-3 checkpoint, or a hub id such as google/gemma-3-4b-it. "
            "[default: the configuration's model_path]",
            show_default=False,
        ),
    ] = None,
    *,
    repository: Annotated[Path, typer.Option(help="Model repository to build into.")] = DEFAULT_REPOSITORY,
    config: ConfigFile = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 serves the network: Triton has no authentication.")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Triton's HTTP API; 0 picks a free port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Triton's gRPC API; 0 picks a free port.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Triton's Prometheus metrics; 0 picks a free port.")] = 8002,
    gateway_host: Annotated[
        str | None,
        typer.Option(help="Address the gateway listens on; Triton can stay on this machine. [default: --host]"),
    ] = None,
    gateway_port: Annotated[
        int | None, typer.Option(help="The gateway's port; 0 picks a free one. [default: server_port, 8080]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built and served, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the machine, fetch the model, build what fits, write a configuration for it, and serve until Ctrl-C.

    Runtime and precision are the best that fit into memory: TensorRT where there is a GPU for it, else the CPU; int8
    where it leaves room for answers, else int4. Whatever the configuration (--config, wicore.json, WICORE_…) says goes
    before what is chosen here (docs/configuration.md). A second run finds that nothing is to be built.

    wicore up google/gemma-3-1b-it

    wicore up ./gemma-3-4b-it --gateway-host 0.0.0.0
    """
    from builders.hub import resolve
    from client.server import ServerOptions
    from client.sizing import choose
    from python_backends import config as configuration

    settings = configuration.load_file(config) if config else configuration.load(repository)
    wanted = model or settings.model_path
    if not wanted:
        raise ConfigError("name a checkpoint: wicore up google/gemma-3-1b-it (or model_path in the configuration)")
    _check_machine()
    folder = resolve(wanted, revision)
    plan = choose(folder, settings)
    if not as_json:
        say(f"{colour('Plan', '36')}     {plan}")
    if dry_run:
        emit({"event": "plan", **dataclasses.asdict(plan)})
        return
    built = _build(folder, repository, plan, as_json=as_json)
    say(f"{colour('Built', '36')}    {repository} ({'up to date' if built.up_to_date else f'{built.seconds:.1f} s'})")
    settings = _write_configuration(repository, config, plan)
    options = ServerOptions(
        repository, host, http_port, grpc_port, metrics_port, drain_s=settings.drain_s, config=settings
    )
    front = gateway_settings(repository, settings, gateway_host or host, gateway_port)
    serve_until_signal(options, front, restart=True, show_log=False, as_json=as_json)


def _check_machine() -> None:
    """Raise ServerStartError where serving would fail whatever is built."""
    from client.doctor.checks import run_machine

    status = Status()
    status("checking the machine …")
    findings = run_machine()
    status.clear()
    for finding in findings:
        if finding.level == "warning":
            say(f"{colour('Note', '33')}     {finding.found}: {finding.advice}")
    errors = [f"{finding.found}: {finding.advice} ({finding.link})" for finding in findings if finding.level == "error"]
    if errors:
        raise ServerStartError("this machine cannot serve yet; " + "; ".join(errors))


def _build(folder: Path, repository: Path, plan: Plan, *, as_json: bool) -> Result:
    import contextlib

    from builders.build import Options, Silence, build
    from builders.cli import Bars
    from builders.quantize import Precision

    options = Options(Precision.of(plan.precision, plan.block_size), plan.runtime)
    with contextlib.nullcontext(Silence()) if as_json else Bars() as reporter:
        return build(folder, repository, options, reporter=reporter)


def _write_configuration(repository: Path, file: Path | None, plan: Plan) -> Config:
    """Write the plan's sizes where the repository has no configuration; the one that is there is its owner's."""
    from python_backends import config

    if file is not None:
        return config.load_file(file)
    path = repository / config.CONFIG_NAME
    if not path.exists():
        path.write_text(json.dumps(plan.configuration(), indent=2) + "\n", encoding="utf-8")
        say(f"{colour('Wrote', '36')}    {path}")
    return config.load(repository)
