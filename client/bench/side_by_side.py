"""The same load on the engine alone and through Triton, in turns, so that what differs is Triton."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.bench import machine
from client.bench.figures import DecodeSpeed, gaps, percentile
from client.bench.load import Target, Trace, together
from client.bench.plot import Chart
from client.bench.prompts import Prompts
from client.bench.report import columns, latency_table, steps_text
from client.bench.suite import Plan, closed, decode, floor, middle, opened, prefill, warm_up
from python_backends import config, manifest
from python_backends.config import Config
from python_backends.manifest import Manifest

RATE_SHARE = 0.6
"""Of what a closed loop gets through, the arrivals of the open loop where no rate is given."""


@contextmanager
def repository_with(repository: Path, settings: Config, folder: Path) -> Iterator[Path]:
    """A repository in ``folder`` that shares every file with another and has settings of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in repository.iterdir():
        if entry.name != config.CONFIG_NAME:
            (folder / entry.name).symlink_to(entry.resolve(), target_is_directory=entry.is_dir())
    values = json.dumps(settings.changed(), indent=2)
    (folder / config.CONFIG_NAME).write_text(values, encoding="utf-8")
    yield folder


def measure_targets(
    targets: Sequence[Target], repository: Path, plan: Plan, rate: float | None, threads: int, report: Any
) -> dict[str, Any]:
    """What `wicore bench serve` shows, as JSON values.

    Args:
        targets: the first is what the others are compared with.
        repository: of the tokenizer that prompts are made with.
        plan: sizes; every batch is a concurrency of the closed loop as well.
        rate: requests a second of the open loop; None takes `RATE_SHARE` of the last target's closed loop.
        threads: compute threads of the engine on this machine, whose memory bandwidth gives the floor; 0: it is
            elsewhere and has no floor.
        report: called with a line of text when something is about to be measured.

    Raises:
        WiCoreError: a request failed.
    """
    prompts, built = Prompts(repository, plan.seed), manifest.read(repository)
    bandwidth = {}
    if threads:
        report("measuring the memory …")
        bandwidth = machine.memory_bandwidth(threads)
    report("warming up …")
    for target in targets:
        warm_up(target, prompts, plan)
    runs = _decode_in_turns(targets, prompts, plan, report)
    values: dict[str, Any] = {"bandwidth_bytes_per_s": bandwidth, "targets": {}}
    best = max(bandwidth.values(), default=0.0)
    for target in targets:
        report(f"prefill, {target.name} …")
        values["targets"][target.name] = {
            "decode": [_shown(built, middle(runs[target.name, batch]), best) for batch in plan.batches],
            "decode_runs_tokens_per_s": {
                str(batch): [run.tokens_per_s for run in runs[target.name, batch]] for batch in plan.batches
            },
            "prefill": prefill(target, prompts, plan),
            "closed_loop": [],
        }
    for concurrency in plan.batches:
        for target in targets:
            report(f"closed loop of {concurrency}, {target.name} …")
            found = closed(target, prompts, plan, concurrency)
            values["targets"][target.name]["closed_loop"].append(found)
    chosen = rate or RATE_SHARE * values["targets"][targets[-1].name]["closed_loop"][-1]["requests_per_s"]
    for target in targets:
        report(f"open loop of {chosen:.2f} requests a second, {target.name} …")
        found = dataclasses.asdict(opened(target, prompts, plan, chosen))
        values["targets"][target.name]["open_loop"] = {"requests_per_s_offered": chosen, **found}
    if len(targets) > 1:
        values["cost"] = [
            cost(batch, runs[targets[0].name, batch], runs[targets[-1].name, batch], machine.cores())
            for batch in plan.batches
        ]
    values["gaps_ms"] = {target.name: _gap_percentiles(together(target, _jobs(prompts, plan))) for target in targets}
    return values


def _shown(built: Manifest, run: DecodeSpeed, bandwidth: float) -> dict[str, Any]:
    return {**dataclasses.asdict(run), **(floor(built, run, bandwidth) if bandwidth else {})}


def _jobs(prompts: Prompts, plan: Plan) -> list[Any]:
    return [prompts.job(plan.prompt_tokens, plan.output_tokens) for _ in range(max(plan.batches))]


def _decode_in_turns(
    targets: Sequence[Target], prompts: Prompts, plan: Plan, report: Any
) -> dict[tuple[str, int], list[DecodeSpeed]]:
    runs: dict[tuple[str, int], list[DecodeSpeed]] = {}
    for number in range(plan.repeats):
        for batch in plan.batches:
            for target in targets:
                report(f"decoding, batch {batch}, {target.name}, run {number + 1} of {plan.repeats} …")
                runs.setdefault((target.name, batch), []).append(decode(target, prompts, plan, batch))
    return runs


def cost(batch: int, alone: Sequence[DecodeSpeed], through: Sequence[DecodeSpeed], cores: int) -> dict[str, float]:
    """What Triton adds to a decode step: the median over pairs of runs that followed each other.

    ``share_without_client`` leaves out the CPU time of the client, spread over the cores: elsewhere it would not count.
    """
    added = [after.step_ms - before.step_ms for before, after in zip(alone, through, strict=True)]
    shares = [extra / before.step_ms for extra, before in zip(added, alone, strict=True)]
    client = [
        1e-3 * batch * run.cpu_us_per_token / cores / before.step_ms for run, before in zip(through, alone, strict=True)
    ]
    return {
        "batch": batch,
        "step_ms": statistics.median(run.step_ms for run in alone),
        "added_ms": statistics.median(added),
        "added_us_per_token": 1e3 * statistics.median(added) / batch,
        "share_of_step": statistics.median(shares),
        "client_cpu_us_per_token": statistics.median(run.cpu_us_per_token for run in through),
        "share_without_client": statistics.median(all_ - its for all_, its in zip(shares, client, strict=True)),
        "share_of_step_lowest": min(shares),
        "share_of_step_highest": max(shares),
    }


def _gap_percentiles(traces: Sequence[Trace]) -> list[list[float]]:
    """(percentile, ms) for a plot."""
    values = [1e3 * gap for trace in traces for _, gap in gaps(trace)] or [0.0]
    return [[which, round(percentile(values, which), 3)] for which in (*range(0, 100, 2), 99, 100)]


def text(found: Mapping[str, Any]) -> str:
    """As a person reads it."""
    speeds = [
        [f"batch {run['batch']}", name, run["tokens_per_s"], run["step_ms"], run["inter_token_p50_ms"],
         run["inter_token_p99_ms"], f"{run['share']:.0%}" if "share" in run else "–"]
        for name, values in found["targets"].items() for run in values["decode"]
    ]  # fmt: skip
    loops = [
        (f"closed, {name}", run["concurrency"], run)
        for name, values in found["targets"].items()
        for run in values["closed_loop"]
    ]
    loops += [
        (f"Poisson, {name}", f"{values['open_loop']['requests_per_s_offered']:.2f}/s", values["open_loop"])
        for name, values in found["targets"].items()
    ]
    filled = [
        f"prefill of {values['prefill']['prompt_tokens']} tokens, {name}: {values['prefill']['tokens_per_s']:.0f} "
        f"tokens/s, first token after {values['prefill']['ttft_ms']:.0f} ms"
        for name, values in found["targets"].items()
    ]
    parts = [
        columns(["decode", "", "tokens/s", "step ms", "p50 ms", "p99 ms", "of floor"], speeds),
        "\n".join(filled),
        latency_table(loops),
        "\n".join(
            f"closed loop of {run['concurrency']}, {name}, {steps_text(run['steps'])}"
            for name, values in found["targets"].items()
            for run in values["closed_loop"]
        ),
    ]
    if "cost" in found:
        rows = [
            [f"batch {run['batch']}", run["step_ms"], run["added_ms"], run["added_us_per_token"],
             *(f"{run[f'share_{name}']:.1%}" for name in ("of_step", "of_step_lowest", "of_step_highest")),
             run["client_cpu_us_per_token"], f"{run['share_without_client']:.1%}"]
            for run in found["cost"]
        ]  # fmt: skip
        heads = [
            "Triton adds",
            "step ms",
            "added ms",
            "µs/token",
            "of a step",
            "lowest",
            "highest",
            "client µs/token",
            "without",
        ]
        parts.append(columns(heads, rows))
    return "\n\n".join(parts)


def chart(found: Mapping[str, Any], title: str) -> Chart:
    """Inter-token latency at the largest batch by percentile, one line per target."""
    drawn = Chart(title, "percentile of tokens", "inter-token latency, ms")
    for name, points in found["gaps_ms"].items():
        drawn.line([(which, value) for which, value in points], name)
    return drawn
