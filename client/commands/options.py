"""Command-line options that several commands take, described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Address = Annotated[
    str, typer.Option(envvar="WICORE_ADDRESS", help="gRPC address of the server, host:port.", show_default=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line, for scripts.")]
Repository = Annotated[Path, typer.Option(help="Model repository, as `wicore build` fills it.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Configuration file. [default: wicore.json in the repository, if any]")
]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens. [default: the server's]")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token; higher is more varied.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that sum up to this share.")]
TopK = Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(help="Makes draws repeatable.")]

DEFAULT_REPOSITORY = Path("model_repository")
