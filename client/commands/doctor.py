"""`wicore doctor`: what this machine has and lacks, and what to do."""

from __future__ import annotations

from typing import Annotated

import typer

from client.commands.options import DEFAULT_REPOSITORY, AsJson, ConfigFile, Repository
from client.commands.terminal import EXIT_FAILED, Status, colour, command, emit

EXIT_WARNED = 3
MARKS = {"ok": ("ok", "32"), "warning": ("warning", "33"), "error": ("error", "31")}


@command
def doctor(
    *,
    repository: Repository = DEFAULT_REPOSITORY,
    config: ConfigFile = None,
    strict: Annotated[bool, typer.Option("--strict", help=f"End with {EXIT_WARNED} where there are warnings.")] = False,
    as_json: AsJson = False,
) -> None:
    """See whether this machine can serve, and say what to do where it cannot.

    Looks for Triton, the GPU, its driver and TensorRT, measures the disk, and checks memory, shared memory, ports, the
    configuration and the model repository. Takes a few seconds and changes nothing. Exit codes: 0 all well or warnings,
    1 an error, 3 warnings with --strict.

    wicore doctor

    wicore doctor --json | jq '.findings[] | select(.level != "ok")'
    """
    from client.doctor.checks import run_all
    from client.doctor.findings import worst
    from python_backends import config as settings

    status = Status()
    status("looking …")
    findings = run_all(repository, lambda: settings.load_file(config) if config else settings.load(repository))
    status.clear()
    level = worst(findings)
    if as_json:
        emit({"level": level, "findings": [finding.as_dict() for finding in findings]})
    else:
        for finding in findings:
            mark, code = MARKS[finding.level]
            print(f"{colour(f'{mark:<8}', code)} {finding.check:<14} {finding.found}")
            if finding.advice:
                print(f"{'':<23} {finding.advice}\n{'':<23} {finding.link}")
    if level == "error":
        raise typer.Exit(EXIT_FAILED)
    if level == "warning" and strict:
        raise typer.Exit(EXIT_WARNED)
