"""`wicore random-checkpoint`: something of a published size to build and measure where no weights are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.commands.options import AsJson
from client.commands.terminal import Status, command, emit


@command
def random_checkpoint(
    shape: Annotated[
        str,
        typer.Argument(
            help="tiny, 270m, 1b, 4b, 12b or 27b, from 4b on with the vision tower; 1b-vision: a small one."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    *,
    layers: Annotated[
        int | None, typer.Option(help="Keep this many layers of the language model. [default: all]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a Gemma-3 checkpoint with random weights (bfloat16): it costs what the real one costs and answers nonsense.

    It is streamed, so memory stays small; the 27B takes 55 GB of disk. `tiny` is for trying commands out.

    wicore random-checkpoint 1b ./random-1b

    wicore build ./random-1b --precision int4 --repository ./random-1b-repository
    """
    from builders.random_checkpoint import make_checkpoint

    status = Status()
    status(f"writing {folder} …")
    size = make_checkpoint(folder, shape, layers)
    status.clear()
    if as_json:
        emit({"folder": str(folder), "shape": shape, "layers": layers, "weight_bytes": size})
    else:
        print(f"{folder}: {shape} with random weights, {size / 1e9:.2f} GB")
