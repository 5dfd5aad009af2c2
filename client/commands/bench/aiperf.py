"""`wicore bench aiperf`: NVIDIA's load generator beside our own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.commands.bench.options import OutputTokens, PromptTokens, Repeats, Requests, Seed
from client.commands.options import DEFAULT_REPOSITORY, AsJson, Repository
from client.commands.terminal import Status, command, emit


@command
def aiperf(
    *,
    repository: Repository = DEFAULT_REPOSITORY,
    program: Annotated[
        Path | None, typer.Option("--aiperf", help="Its program. [default: aiperf on PATH]", show_default=False)
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Callers; each asks again when it has its answer.")] = 4,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 64,
    requests: Requests = 80,
    repeats: Repeats = 5,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compare NVIDIA's aiperf with our own closed loop: prompts of one length against one server's gateway, in turns.

    Beside what each says stands what the gateway saw of the same run. Drafts are off.

    wicore bench aiperf --aiperf ~/aiperf/bin/aiperf
    """
    import tempfile
    from collections.abc import Iterator
    from contextlib import ExitStack, contextmanager

    from client.bench.aiperf import find, measure, text
    from client.bench.prompts import Prompts
    from client.bench.report import configuration_text
    from client.bench.side_by_side import repository_with
    from client.bench.suite import Plan, configuration, settings_for
    from client.commands.demo import demo_server
    from client.gateway.settings import GatewaySettings
    from client.server.gateway import Gateway
    from python_backends import config, contract, manifest

    found_program = find(program)
    plan = Plan(
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, prefill_tokens=prompt_tokens, long_tokens=0,
        batches=(concurrency,), requests=requests, repeats=repeats, seed=seed,
    )  # fmt: skip
    settings = settings_for(plan, config.load(repository), drafts=False)
    built = manifest.read(repository)
    status = Status()
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="wicore-bench-")))
        shared = opened.enter_context(repository_with(repository, settings, folder / "repository"))
        grpc = opened.enter_context(demo_server(shared, status)).addresses.grpc

        @contextmanager
        def gateway() -> Iterator[str]:
            process = Gateway(GatewaySettings(shared, built.name, triton=grpc, port=0, config=settings))
            process.start()
            try:
                yield process.address
            finally:
                process.stop()

        found = measure(
            found_program, gateway, built.name, built.folder(contract.TOKENIZER).resolve(), Prompts(repository, seed),
            plan, concurrency, folder, status,
        )  # fmt: skip
    status.clear()
    about = configuration(repository, plan, settings)
    if as_json:
        emit({"configuration": about, **found})
    else:
        print(configuration_text(about), text(found), sep="\n\n")
