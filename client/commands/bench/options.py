"""Options that the benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Batches = Annotated[list[int] | None, typer.Option("--batch", help="Sequences at once; may be given again. [1 4 8]")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")]
OutputTokens = Annotated[int, typer.Option(min=4, help="Tokens of an answer; all have as many.")]
PrefillTokens = Annotated[int, typer.Option(min=1, help="Tokens of the prompt that prefill is measured with.")]
LongTokens = Annotated[int, typer.Option(min=0, help="Tokens of the long prompt amid decoding; 0 leaves it out.")]
Requests = Annotated[int, typer.Option(min=1, help="Requests of a closed or open loop.")]
Repeats = Annotated[int, typer.Option(min=1, help="Runs of every batch; the median is shown.")]
Seed = Annotated[int, typer.Option(help="Of prompts and arrivals.")]
Plot = Annotated[Path | None, typer.Option(help="Write a chart to this SVG file.")]
Drafts = Annotated[
    bool, typer.Option("--drafts", help="Keep speculative decoding on; by default every token has its own step.")
]
TargetMs = Annotated[
    int | None,
    typer.Option(min=1, help="Inter-token target that prefill chunks are cut for. [default: the repository's]"),
]
DEFAULT_BATCHES = [1, 4, 8]
