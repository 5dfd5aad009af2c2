"""NVIDIA's aiperf and our own closed loop against the gateway, in turns: as many callers, tokens and answers.

No prompt is asked twice: the server would find it in its KV cache, and whoever came second would be answered sooner.

Each run has a gateway of its own, whose account of first tokens stands beside what the callers saw: where the two
callers differ and it does not, the difference lies in the callers; where it differs as they do, in the load. aiperf
begins a request's time before its event loop comes to write it; how long that takes it says itself (`sending_mean_ms`).

aiperf counts events with text alone, so the answer's end is banned until the last token (``min_tokens``).
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from client.bench.figures import percentile
from client.bench.load import Job, Trace, closed_loop
from client.bench.prompts import Prompts
from client.bench.report import columns
from client.bench.suite import Plan
from client.bench.targets import GatewayTarget
from python_backends.errors import BuildError, ServerUnavailableError

SIDES = ("aiperf", "ours")
EXPORT = "profile_export_aiperf.json"
TIMEOUT_S = 900.0
Report = Callable[[str], object]
Opened = Callable[[], AbstractContextManager[str]]
"""Opens a gateway of its own; gives its URL."""


@dataclass(frozen=True)
class Load:
    """What one side offers in a round."""

    jobs: tuple[Job, ...]
    concurrency: int
    warm_up: int
    """Requests before those that are measured, the first of ``jobs``."""


def find(given: Path | None) -> str:
    """aiperf's program.

    Raises:
        BuildError: it is not there.
    """
    path = shutil.which(str(given) if given else "aiperf")
    if path is None:
        raise BuildError(
            f"there is no {given or 'aiperf'}; install it into an environment of its own (python3 -m venv aiperf && "
            "aiperf/bin/pip install aiperf) and name it: --aiperf aiperf/bin/aiperf"
        )
    return path


def measure(
    program: str, open_gateway: Opened, model: str, tokenizer: Path, prompts: Prompts, plan: Plan,
    concurrency: int, folder: Path, report: Report,
) -> dict[str, Any]:  # fmt: skip
    """What `wicore bench aiperf` shows, as JSON values: medians over the repeats, and every run.

    Raises:
        ServerUnavailableError: aiperf could not measure, or a request failed.
    """
    warm_up = 2 * concurrency
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(plan.repeats):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            jobs = tuple(prompts.job(plan.prompt_tokens, plan.output_tokens) for _ in range(warm_up + plan.requests))
            load = Load(jobs, concurrency, warm_up)
            report(f"{side}, round {number + 1} of {plan.repeats} …")
            with open_gateway() as address:
                if side == "ours":
                    figures = _ours(address, load)
                else:
                    figures = _aiperf(program, address, model, tokenizer, load, folder / f"round-{number}")
                runs[side].append({**figures, **_as_the_gateway_saw(address)})
    return {side: {"median": _medians(runs[side]), "runs": runs[side]} for side in SIDES}


def _ours(address: str, load: Load) -> dict[str, float]:
    target = GatewayTarget(address, min_tokens=load.jobs[0].max_tokens)
    try:
        closed_loop(target, iter(load.jobs), load.concurrency, load.warm_up)
        traces = closed_loop(target, iter(load.jobs[load.warm_up :]), load.concurrency, len(load.jobs) - load.warm_up)
    finally:
        target.close()
    failed = next((trace.error for trace in traces if trace.error), "")
    if failed:
        raise ServerUnavailableError(f"a request failed: {failed}")
    return of_traces(traces)


def of_traces(traces: Sequence[Trace]) -> dict[str, float]:
    """Figures as aiperf defines them: between tokens is the mean of a request, and percentiles are over requests."""
    first = [1e3 * (trace.stamps[0] - trace.arrival_s) for trace in traces]
    whole = [1e3 * (trace.stamps[-1] - trace.arrival_s) for trace in traces]
    between = [(end - begin) / (len(trace.stamps) - 1) for begin, end, trace in zip(first, whole, traces, strict=True)]
    seconds = max(trace.ended_s for trace in traces) - min(trace.arrival_s for trace in traces)
    return {
        "ttft_p50_ms": percentile(first, 50),
        "inter_token_p50_ms": percentile(between, 50),
        "request_p50_ms": percentile(whole, 50),
        "tokens_per_s": sum(len(trace.stamps) for trace in traces) / seconds,
        "requests_per_s": len(traces) / seconds,
    }


def _aiperf(program: str, address: str, model: str, tokenizer: Path, load: Load, folder: Path) -> dict[str, float]:
    folder.mkdir(parents=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps({'text': job.text})}\n" for job in load.jobs), encoding="utf-8")
    command = [
        program, "profile", "--model", model, "--url", address, "--endpoint-type", "chat", "--streaming",
        "--tokenizer", str(tokenizer), "--use-server-token-count",
        "--input-file", str(prompts), "--custom-dataset-type", "single_turn",
        "--dataset-sampling-strategy", "sequential",
        "--concurrency", str(load.concurrency), "--request-count", str(len(load.jobs) - load.warm_up),
        "--warmup-request-count", str(load.warm_up),
        "--extra-inputs", f"max_tokens:{load.jobs[0].max_tokens}",
        "--extra-inputs", f"min_tokens:{load.jobs[0].max_tokens}",
        "--extra-inputs", "ignore_eos:true", "--export-http-trace",
        # It would ask /metrics three times a second, and look for GPUs.
        "--no-server-metrics", "--no-gpu-telemetry",
        "--artifact-dir", str(folder / "artifacts"), "--ui", "none",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    found = next((folder / "artifacts").rglob(EXPORT), None)
    if done.returncode or found is None:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR" in line] or ["it does not say why"]
        raise ServerUnavailableError(f"aiperf cannot measure {address}: {said[0].strip()}")
    return read_export(json.loads(found.read_text(encoding="utf-8")), len(load.jobs) - load.warm_up)


def read_export(exported: Mapping[str, Any], requests: int) -> dict[str, float]:
    """Figures of its JSON export.

    Raises:
        ServerUnavailableError: it did not get so many answers.
    """
    answered = round(exported["request_count"]["avg"])
    if answered != requests:
        raise ServerUnavailableError(f"aiperf got {answered} answers of {requests}")
    return {
        "ttft_p50_ms": exported["time_to_first_token"]["p50"],
        "inter_token_p50_ms": exported["inter_token_latency"]["p50"],
        "request_p50_ms": exported["request_latency"]["p50"],
        "tokens_per_s": exported["output_token_throughput"]["avg"],
        "requests_per_s": exported["request_throughput"]["avg"],
        "sending_mean_ms": exported["http_req_sending"]["avg"],
    }


def _as_the_gateway_saw(address: str) -> dict[str, float]:
    """From a request's arrival at the gateway to its first piece, warm-up included."""
    latencies = httpx.get(f"{address}/v1/stats", timeout=30).raise_for_status().json()["latency_ms"]
    return {
        "gateway_ttft_p50_ms": latencies["time_to_first_token"]["p50"],
        "gateway_request_p50_ms": latencies["request"]["p50"],
    }


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def text(found: Mapping[str, Any]) -> str:
    """As a person reads it."""
    rows = [[name, *(_spread(found[side]["runs"], name) for side in SIDES)] for name in found[SIDES[0]]["median"]]
    return columns(["median (least to most)", *SIDES], rows)


def _spread(runs: Sequence[Mapping[str, float]], name: str) -> str:
    values = [run[name] for run in runs if name in run]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "–"
