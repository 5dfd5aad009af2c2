"""`wicore bench engine`: the decode engine in this process, without Triton."""

from __future__ import annotations

from client.commands.bench.options import (
    DEFAULT_BATCHES,
    Batches,
    Drafts,
    LongTokens,
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
from client.commands.terminal import Status, command, emit, say


@command
def engine(
    *,
    repository: Repository = DEFAULT_REPOSITORY,
    batch: Batches = None,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 64,
    prefill_tokens: PrefillTokens = 512,
    long_tokens: LongTokens = 2048,
    requests: Requests = 16,
    repeats: Repeats = 3,
    drafts: Drafts = False,
    target_ms: TargetMs = None,
    seed: Seed = 0,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Measure the decode engine alone: batches, prefill, a closed loop, and a long prompt amid decoding requests.

    The floor of a step is the time to read the decoder's weights and the live KV once at the memory bandwidth measured
    in the same run. Times are taken where the answer's tokens come out. Settings are the repository's.

    wicore bench engine --repository ./random-1b-repository --plot long-prompt.svg
    """
    from client.bench.report import configuration_text, engine_text, intrusion_chart
    from client.bench.suite import Plan, configuration, measure_engine, settings_for
    from client.bench.targets import open_engine_target
    from python_backends import config

    plan = Plan(
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, prefill_tokens=prefill_tokens,
        long_tokens=long_tokens, batches=tuple(batch or DEFAULT_BATCHES), requests=requests, repeats=repeats, seed=seed,
    )  # fmt: skip
    settings = settings_for(plan, config.load(repository), drafts=drafts, target_ms=target_ms)
    status = Status()
    status("loading the decoder …")
    with open_engine_target(repository, settings) as target:
        found = measure_engine(target, repository, plan, settings, status)
    status.clear()
    about = configuration(repository, plan, settings)
    if plot is not None and "long_prompt" in found:
        intrusion_chart(found["long_prompt"], f"{about['model']} {about['precision']}: a long prompt").save(plot)
    if as_json:
        emit({"configuration": about, **found})
        return
    print(configuration_text(about), engine_text(found), sep="\n\n")
    if plot is not None and "long_prompt" not in found:
        say("No chart was written: it shows the long prompt, which was left out.")
