"""`wicore bench gateway`: what the gateway costs."""

from __future__ import annotations

from client.commands.bench.options import Batches, OutputTokens, PromptTokens, Repeats, Seed
from client.commands.options import DEFAULT_REPOSITORY, AsJson, Repository
from client.commands.terminal import Status, command, emit

DEFAULT_STREAMS = [1, 16]


@command
def gateway(
    *,
    repository: Repository = DEFAULT_REPOSITORY,
    batch: Batches = None,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 64,
    repeats: Repeats = 15,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure what the gateway adds: the same streams through it and straight over gRPC, in turns, on one server.

    By default 1 and 16 streams. Time to the first token is the mean over the streams of a round, and what is added
    the median over pairs of rounds. Client, gateway and server share this machine, so the gateway's work also slows the
    server; with cores to spare it costs less. Drafts are off, so that every event is one token.

    wicore bench gateway --repository ./random-1b-repository
    """
    import tempfile
    from contextlib import ExitStack
    from pathlib import Path

    from client.bench.gateway import measure_gateway, text
    from client.bench.prompts import Prompts
    from client.bench.report import configuration_text
    from client.bench.side_by_side import repository_with
    from client.bench.suite import Plan, configuration, settings_for
    from client.bench.targets import GatewayTarget, ServerTarget
    from client.commands.demo import demo_server
    from client.gateway.settings import GatewaySettings
    from client.server.gateway import Gateway
    from python_backends import config, manifest

    plan = Plan(
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, prefill_tokens=prompt_tokens, long_tokens=0,
        batches=tuple(batch or DEFAULT_STREAMS), repeats=repeats, seed=seed,
    )  # fmt: skip
    settings = settings_for(plan, config.load(repository), drafts=False)
    status = Status()
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="wicore-bench-")))
        shared = opened.enter_context(repository_with(repository, settings, folder / "repository"))
        grpc = opened.enter_context(demo_server(shared, status)).addresses.grpc
        name = manifest.read(repository).name
        process = Gateway(GatewaySettings(shared, name, triton=grpc, port=0, config=settings))
        opened.callback(process.stop)
        process.start()
        direct, through = ServerTarget(grpc), GatewayTarget(process.address)
        opened.callback(direct.close)
        opened.callback(through.close)
        found = measure_gateway(direct, through, Prompts(repository, seed), plan, status)
    status.clear()
    about = configuration(repository, plan, settings)
    if as_json:
        emit({"configuration": about, **found})
    else:
        print(configuration_text(about), text(found), sep="\n\n")
