"""`wicore bench precision`: what a lower precision of slower tiers does to answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.commands.bench.options import Seed
from client.commands.options import DEFAULT_REPOSITORY, AsJson, Repository
from client.commands.terminal import Status, command, emit


@command
def precision(
    *,
    repository: Repository = DEFAULT_REPOSITORY,
    checkpoint: Annotated[Path | None, typer.Option(help="Of the tokenizer. [default: the demo's]")] = None,
    conversations: Annotated[int, typer.Option(min=1, help="Held-out conversations.")] = 200,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Ask the demo's held-out questions with KV kept as it is, in int8 and in int4, and compare the answers.

    kv_host_precision and kv_nvme_precision in wicore.json turn this on for a server; its default is as it is.

    wicore demo build && wicore bench precision
    """
    from client.bench.precision import measure, precision_text
    from client.commands.demo import checkpoint_folder

    status = Status()
    found = measure(repository, checkpoint or checkpoint_folder(), conversations, seed, status)
    status.clear()
    if as_json:
        emit(found)
    else:
        print(precision_text(found))
