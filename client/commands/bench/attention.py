"""`wicore bench attention`: whether attention tells the KV cache what to keep."""

from __future__ import annotations

from typing import Annotated

import typer

from client.commands.bench.options import Seed
from client.commands.options import AsJson
from client.commands.terminal import Status, command, emit

DEFAULT_CAPACITIES = [100, 200, 300, 400]


@command
def attention(
    *,
    conversations: Annotated[int, typer.Option(min=2, help="Long conversations to record.")] = 120,
    capacity: Annotated[
        list[int] | None, typer.Option(min=1, help="Blocks of 16 tokens; may be given again. [100 200 300 400]")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Record the attention in long conversations of the demo model, and replay them with and without it.

    Hit rate is prompt tokens found ÷ all prompt tokens under A²CR with several values of `hmt_attention_weight`.

    wicore bench attention --conversations 40 --capacity 300
    """
    from client.bench.cache.attention import attention_text, compare, record
    from client.commands.demo import PRECISION, build_demo, checkpoint_folder
    from client.server.installation import cache_folder

    status = Status()
    status("building the demo model …")
    _, built = build_demo(cache_folder() / f"{checkpoint_folder().name}_{PRECISION}")
    talks = record(built.manifest, conversations, seed, status)
    outcomes = []
    for blocks in capacity or DEFAULT_CAPACITIES:
        status(f"{blocks} blocks …")
        outcomes.append(compare(talks, blocks, seed))
    status.clear()
    if as_json:
        emit({"conversations": conversations, "seed": seed, "replays": [outcome.as_dict() for outcome in outcomes]})
        return
    print(attention_text(talks, outcomes))
