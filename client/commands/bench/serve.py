"""`wicore bench serve`: through Triton over gRPC, beside the engine alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.commands.bench.options import (
    DEFAULT_BATCHES,
    Batches,
    Drafts,
    OutputTokens,
    Plot,
    PrefillTokens,
    PromptTokens,
    Repeats,
    Requests,
    Seed,
    TargetMs,
)
from client.commands.options import DEFAULT_REPOSITORY, AsJson, Repository
from client.commands.terminal import Status, command, emit

if TYPE_CHECKING:
    from client.bench.load import Target
    from python_backends.config import Config


@command
def serve(
    *,
    repository: Repository = DEFAULT_REPOSITORY,
    address: Annotated[
        str | None,
        typer.Option(
            help="gRPC address of a server that serves this repository already; it is then measured alone. "
            "[default: start one, and compare it with the engine]"
        ),
    ] = None,
    batch: Batches = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Poisson arrivals a second. [default: 0.6 of what the closed loop gets through]"),
    ] = None,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 64,
    prefill_tokens: PrefillTokens = 512,
    requests: Requests = 24,
    repeats: Repeats = 3,
    drafts: Drafts = False,
    target_ms: TargetMs = None,
    seed: Seed = 0,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Measure through Triton over gRPC streams, in turns with the engine alone, so that Triton's cost is a figure.

    Decode batches, a closed loop of every --batch, and Poisson arrivals, where a request's clock starts when it was to
    arrive. The client runs on the same machine and its work counts as Triton's.

    wicore bench serve --repository ./random-1b-repository --plot latency.svg
    """
    from client.bench import machine
    from client.bench.report import configuration_text
    from client.bench.side_by_side import chart, measure_targets, text
    from client.bench.suite import Plan, configuration, settings_for
    from python_backends import config

    plan = Plan(
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, prefill_tokens=prefill_tokens, long_tokens=0,
        batches=tuple(batch or DEFAULT_BATCHES), requests=requests, repeats=repeats, seed=seed,
    )  # fmt: skip
    settings = settings_for(plan, config.load(repository), drafts=drafts, target_ms=target_ms)
    status = Status()
    with _targets(repository, address, settings, status) as targets:
        threads = 0 if address else machine.compute_threads(settings.num_threads)
        found = measure_targets(targets, repository, plan, rate, threads, status)
    status.clear()
    about = configuration(repository, plan, settings)
    if address:
        about = {key: about[key] for key in ("processor", "cores", "versions", "model", "plan")} | {"server": address}
    if plot is not None:
        title = f"{about['model']} {about.get('precision', '')}: {max(plan.batches)} requests decoding"
        chart(found, title).save(plot)
    if as_json:
        emit({"configuration": about, **found})
    else:
        print(configuration_text(about), text(found), sep="\n\n")


@contextmanager
def _targets(repository: Path, address: str | None, settings: Config, status: Any) -> Iterator[list[Target]]:
    """The engine and the server with the same settings; with an address that server alone."""
    from client.bench.side_by_side import repository_with
    from client.bench.targets import ServerTarget, open_engine_target
    from client.commands.demo import demo_server

    with ExitStack() as opened:
        targets: list[Target] = []
        if address is None:
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="wicore-bench-")))
            shared = opened.enter_context(repository_with(repository, settings, folder / "repository"))
            status("loading the engine …")
            targets.append(opened.enter_context(open_engine_target(shared, settings)))
            address = opened.enter_context(demo_server(shared, status)).addresses.grpc
        server = ServerTarget(address)
        opened.callback(server.close)
        yield [*targets, server]
