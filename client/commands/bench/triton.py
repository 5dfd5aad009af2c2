"""`wicore bench triton`: perf_analyzer's figures as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.commands.options import DEFAULT_REPOSITORY, AsJson, Repository
from client.commands.terminal import Status, command, emit

if TYPE_CHECKING:
    from client.bench.perf_analyzer import Measurement

PROMPT = "Describe the picture: how many shapes are there, of which colours, and where?"


@command
def triton(
    *,
    address: Annotated[
        str | None,
        typer.Option(envvar="WICORE_ADDRESS", help="gRPC address of a running server. [default: start one]"),
    ] = None,
    repository: Repository = DEFAULT_REPOSITORY,
    concurrency: Annotated[list[int] | None, typer.Option(help="Requests at once; may be given again. [1 2 4]")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer.")] = 64,
    prompt: Annotated[str, typer.Option(help="The question.")] = PROMPT,
    image: Annotated[Path | None, typer.Option(help="Picture of the second workload. [default: a drawing]")] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave the workload with a picture out.")] = False,
    requests: Annotated[int, typer.Option(min=1, help="Requests in a measurement, at the least.")] = 20,
    tools: Annotated[Path, typer.Option(help="Folder that perf_analyzer is installed into.")] = Path(".bench"),
    as_json: AsJson = False,
) -> None:
    """Measure a server with NVIDIA's perf_analyzer over gRPC streams: text, and text with a picture.

    Answers are greedy and all of one length. TTFT is the time to the first token; requests/s and tokens/s count the
    whole server. Without --address the repository (by default the demo model, built if need be) is served for it.
    """
    from client.bench.machine import cores, processor
    from client.bench.perf_analyzer import Workload, install, measure

    status = Status()
    status("installing perf_analyzer …")
    binary = install(tools)
    workloads = [Workload("text", prompt, max_tokens)]
    if not text_only:
        workloads.append(Workload("picture", prompt, max_tokens, image.read_bytes() if image else _drawing()))
    found = []
    with _server(address, repository, status) as (target, configuration):
        for measurement in measure(binary, target, workloads, concurrency or [1, 2, 4], requests):
            found.append(measurement)
            status(f"measured {measurement.workload} × {measurement.concurrency}")
    status.clear()
    configuration |= {"max_tokens": max_tokens, "cpu": processor(), "cores": cores()}
    if as_json:
        emit({"configuration": configuration, "measurements": [dataclasses.asdict(one) for one in found]})
        return
    print(", ".join(f"{name} {value}" for name, value in configuration.items()))
    print(table(found))


def table(measurements: list[Measurement]) -> str:
    """Aligned columns."""
    from client.bench.report import columns

    heads = ["workload", "concurrency", "requests", "failed", "requests/s", "tokens/s", "TTFT p50 ms", "p99",
             "latency p50 ms", "p99", "token p50 ms"]  # fmt: skip
    return columns(heads, [dataclasses.astuple(one) for one in measurements])


@contextmanager
def _server(address: str | None, repository: Path, status: Status) -> Iterator[tuple[str, dict[str, Any]]]:
    """A server's address, and what is known of what it serves."""
    if address:
        yield address, {"server": address}
        return
    from client.commands.demo import build_demo, demo_server
    from python_backends import manifest

    if not (repository / manifest.MANIFEST_NAME).exists():
        status("building the demo model …")
        repository, _ = build_demo(repository)
    built = manifest.read(repository)
    with demo_server(repository, status) as server:
        status("measuring …")
        yield server.addresses.grpc, {"model": built.name, "precision": built.precision, "runtime": built.runtime}


def _drawing() -> bytes:
    from builders.demo.evaluate import sample_picture
    from client.request import encoded

    return encoded(sample_picture(0)[0])
