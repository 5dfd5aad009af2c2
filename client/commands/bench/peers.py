"""`wicore bench peers`: other engines beside ours on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.commands.bench.options import (
    DEFAULT_BATCHES,
    Batches,
    OutputTokens,
    PrefillTokens,
    PromptTokens,
    Repeats,
    Seed,
)
from client.commands.options import AsJson
from client.commands.terminal import Status, command, emit

DEFAULT_OURS = ["int4:128", "int8:32"]
DEFAULT_GGUF = ["q4_0", "q8_0"]


@command
def peers(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder; `wicore random-checkpoint 1b` makes one.")],
    *,
    ours: Annotated[
        list[str] | None,
        typer.Option(
            help="A precision of ours such as int4:32, with settings if need be: int4:32@prefill_chunk=256. May be "
            "given again. [int4:128 int8:32]"
        ),
    ] = None,
    gguf: Annotated[
        list[str] | None,
        typer.Option(help="A type of llama.cpp's: q4_0, q8_0, bf16, f32. May be given again. [q4_0 q8_0]"),
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Leave out llama.cpp or transformers; may be given again.")
    ] = None,
    batch: Batches = None,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 32,
    prefill_tokens: PrefillTokens = 512,
    probe_tokens: Annotated[
        int, typer.Option(min=64, help="Tokens of the prompt whose last 64 logits are compared; 640 leaves a window.")
    ] = 640,
    repeats: Repeats = 3,
    threads: Annotated[int, typer.Option(min=0, help="Compute threads of every engine; 0: every core.")] = 0,
    tools: Annotated[
        Path, typer.Option(help="Folder that keeps llama.cpp, GGUF files and builds from run to run.")
    ] = Path(".bench"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure our engine, transformers (bfloat16) and llama.cpp on the same weights, in turns.

    Decode tokens/s over all sequences (by the median step, greedy, while the whole batch decodes), prefill tokens/s,
    peak memory, and the mean cosine and relative error of the logits against transformers in float32. Of each peer's
    settings (llama.cpp: flash attention, repacked weights; transformers: attention) the fastest for each load is
    found first. llama.cpp is compiled into --tools the first time; transformers needs PyTorch.

    wicore bench peers ./random-1b --ours int4:32 --ours int4:128
    """
    from client.bench import machine
    from client.bench.peers.compare import PROBED, compare, text
    from client.bench.peers.engines import Setup
    from client.bench.report import configuration_text
    from client.bench.suite import Plan

    plan = Plan(
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, prefill_tokens=prefill_tokens, long_tokens=0,
        batches=tuple(batch or DEFAULT_BATCHES), repeats=repeats, seed=seed,
    )  # fmt: skip
    computing = machine.compute_threads(threads)
    setup = Setup(
        checkpoint, tools, tuple(ours or DEFAULT_OURS), tuple(gguf or DEFAULT_GGUF), frozenset(without or ()),
        computing, plan, probe_tokens,
    )  # fmt: skip
    status = Status()
    found = compare(setup, status)
    status.clear()
    about = {
        "processor": machine.processor(),
        "threads": computing,
        "versions": machine.versions(),
        "model": checkpoint.resolve().name,
        "prompt": f"{prompt_tokens} tokens before decoding {output_tokens}; prefill of {prefill_tokens}",
        "logits": f"the last {PROBED} of a prompt of {probe_tokens} tokens",
        "runs": f"{repeats} after a trial, engines in turns",
    }
    if as_json:
        emit({"configuration": about, **found})
    else:
        print(configuration_text(about), text(found), sep="\n\n")
