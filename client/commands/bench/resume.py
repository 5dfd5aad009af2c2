"""`wicore bench resume`: a conversation that outlives its server."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from client.commands.bench.options import Seed
from client.commands.options import DEFAULT_REPOSITORY, AsJson, Repository
from client.commands.terminal import Status, command, emit


@command
def resume(
    *,
    repository: Repository = DEFAULT_REPOSITORY,
    folder: Annotated[
        Path | None, typer.Option(help="Where the tier on disk is put, for the time being. [default: a temporary one]")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns of the conversation before the restart.")] = 20,
    words: Annotated[int, typer.Option(min=1, help="Words, and so tokens, of each question.")] = 130,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Restarts; the median is shown.")] = 3,
    disk_gb: Annotated[float, typer.Option(min=0.001, help="Limit of the tier on disk, GB.")] = 4.0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure how much sooner a long conversation about a picture goes on after a restart than by computing it anew.

    A real server, the session saved to disk, the server stopped; then new servers get the next turn, resumed and
    computed. Needs a model that sees pictures; its load bandwidth is shown beside a plain read of the same files.

    wicore random-checkpoint 1b-vision ./random && wicore build ./random --precision int4 --repository ./repository

    wicore bench resume --repository ./repository
    """
    from client.bench.prompts import Prompts
    from client.bench.resume import Plan, measure, resume_text, settings_for
    from client.bench.side_by_side import repository_with
    from client.commands.demo import demo_server
    from python_backends import config

    plan = Plan(turns, words, answer_tokens, rounds, seed)
    status = Status()
    with ExitStack() as opened:
        made = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="wicore-bench-")))
        tier = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="wicore-kv-", dir=folder or made)))
        settings = settings_for(config.load(repository), tier, disk_gb)
        shared = opened.enter_context(repository_with(repository, settings, made / "repository"))
        found = measure(lambda: demo_server(shared, status), Prompts(repository, seed), plan, tier, status)
    status.clear()
    if as_json:
        emit(found)
    else:
        print(resume_text(found))
