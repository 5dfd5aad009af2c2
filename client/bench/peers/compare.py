"""Our engine, transformers and llama.cpp on the same weights, prompts and threads, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders.model_config import read_model_config
from client.bench.peers.engines import LLAMA, REFERENCE, TRANSFORMERS, Report, Setup, start, start_transformers
from client.bench.peers.protocol import Prompt
from client.bench.peers.worker import Worker
from client.bench.report import columns
from client.bench.suite import Plan

PROBED = 64
"""Positions whose logits are compared, the last of the probe."""
FIRST_WORD = 512
"""Token ids before it are bytes, characters and control tokens in Gemma's vocabulary."""
TRIAL_PROMPT, TRIAL_PREFILL, TRIAL_TOKENS = 16, 128, 8
"""Tokens of a prompt before decoding, of a prefill, and drawn, to find out which variant of an engine is fastest."""

HOPELESS = 0.5
"""A variant that computes prompts at less than this share of another's speed is not tried any further."""

Logits = NDArray[np.float32]


def compare(setup: Setup, report: Report) -> dict[str, Any]:
    """Decode and prefill speeds, peak memory, and how far the logits are from transformers in float32.

    Args:
        setup: what and how.
        report: called with a line of text when something is about to be done.

    Raises:
        BuildError: a peer cannot be installed, or the checkpoint not be built.
        ServerUnavailableError: a peer failed; the message names its log.
    """
    prompts = _prompts(setup)
    (probe,) = prompts.pop("probe")
    with ExitStack() as opened:
        workers = start(setup, opened, report)
        chosen = {worker.name: _choose(worker, setup.plan, prompts, report) for worker in workers}
        times = _times(workers, chosen, setup.plan, prompts, report)
        found = {}
        for worker in workers:
            memory = worker.call("memory")
            report(f"logits, {worker.name} …")
            logits = worker.logits(probe, PROBED)
            worker.close()
            found[worker.name] = (memory, logits)
        wanted = None
        if TRANSFORMERS not in setup.without:
            report(f"logits, {REFERENCE} …")
            wanted = start_transformers(setup, opened, REFERENCE, "float32").logits(probe, PROBED)
    engines = []
    for name, figures in times.items():
        memory, logits = found[name]
        errors: dict[str, float | None] = {"cosine": None, "relative_error": None}
        if wanted is not None:
            errors = {"cosine": cosine(logits, wanted), "relative_error": relative_error(logits, wanted)}
        engines.append({"engine": name, **figures, **chosen[name], "peak_memory_bytes": memory, **errors})
    return {"engines": engines, "ratios": ratios(engines)}


def _prompts(setup: Setup) -> dict[str, list[Prompt]]:
    """Ids without control tokens and pictures, which lie at both ends of a vocabulary."""
    vocabulary = read_model_config(setup.checkpoint).text.vocab_size
    rng = np.random.default_rng(setup.plan.seed)
    low, high = min(FIRST_WORD, vocabulary // 4), vocabulary * 9 // 10

    def draw(count: int, tokens: int) -> list[Prompt]:
        return [list(map(int, ids)) for ids in rng.integers(low, high, (count, tokens))]

    return {
        "decode": draw(max(setup.plan.batches), setup.plan.prompt_tokens),
        "prefill": draw(setup.plan.repeats + 1, setup.plan.prefill_tokens),
        "probe": draw(1, setup.probe_tokens),
    }


def _choose(worker: Worker, plan: Plan, prompts: Mapping[str, list[Prompt]], report: Report) -> dict[str, Any]:
    """Try every variant; the fastest for each batch and for prefill is what the engine is measured with.

    It is the warm-up too: each variant runs everything before it is timed, and the chosen ones a whole prefill.
    """
    trials: dict[str, dict[str, float]] = {}
    short = [prompt[:TRIAL_PROMPT] for prompt in prompts["decode"]]
    whole = prompts["prefill"][0]
    trial = whole[:TRIAL_PREFILL]
    for variant in worker.call("variants"):
        report(f"trying {worker.name}, {variant} …")
        worker.call("use", variant=variant)
        worker.call("prefill", prompt=trial)
        seconds = worker.call("prefill", prompt=trial[::-1])  # another one: ours may find the first in its KV cache
        trials[variant] = speeds = {"prefill": len(trial) / seconds}
        if speeds["prefill"] < HOPELESS * max(each["prefill"] for each in trials.values()):
            continue
        for batch in plan.batches:
            steps = worker.call("decode", prompts=short[:batch], tokens=TRIAL_TOKENS)
            speeds[str(batch)] = batch / statistics.median(steps)
    best = {work: _fastest(trials, work) for work in ("prefill", *map(str, plan.batches))}
    worker.call("keep", variants=sorted(set(best.values())))
    worker.call("use", variant=best["prefill"])
    worker.call("prefill", prompt=whole)
    return {"variants_tokens_per_s": trials, "variant": best}


def _fastest(trials: Mapping[str, Mapping[str, float]], work: str) -> str:
    return max(trials, key=lambda name: trials[name].get(work, 0.0))


def _times(
    workers: Sequence[Worker],
    chosen: Mapping[str, Mapping[str, Any]],
    plan: Plan,
    prompts: Mapping[str, list[Prompt]],
    report: Report,
) -> dict[str, dict[str, Any]]:
    prefills: dict[str, list[float]] = {worker.name: [] for worker in workers}
    steps: dict[str, dict[int, list[float]]] = {
        worker.name: {batch: [] for batch in plan.batches} for worker in workers
    }
    for number in range(1, plan.repeats + 1):
        for worker in workers:
            report(f"prefill, {worker.name}, run {number} of {plan.repeats} …")
            worker.call("use", variant=chosen[worker.name]["variant"]["prefill"])
            seconds = worker.call("prefill", prompt=prompts["prefill"][number])
            prefills[worker.name].append(len(prompts["prefill"][number]) / seconds)
        for batch in plan.batches:
            for worker in workers:
                report(f"decoding, batch {batch}, {worker.name}, run {number} of {plan.repeats} …")
                worker.call("use", variant=chosen[worker.name]["variant"][str(batch)])
                found = worker.call("decode", prompts=prompts["decode"][:batch], tokens=plan.output_tokens)
                steps[worker.name][batch].append(batch / statistics.median(found))
    return {
        name: {
            "decode_tokens_per_s": {str(batch): statistics.median(runs) for batch, runs in steps[name].items()},
            "decode_runs_tokens_per_s": {str(batch): runs for batch, runs in steps[name].items()},
            "prefill_tokens_per_s": statistics.median(prefills[name]),
            "prefill_runs_tokens_per_s": prefills[name],
        }
        for name in prefills
    }


def cosine(values: Logits, reference: Logits) -> float:
    """Mean over positions of the cosine between two rows of logits [T, V]."""
    products = np.einsum("tv,tv->t", values, reference, dtype=np.float64)
    norms = np.linalg.norm(values, axis=1) * np.linalg.norm(reference, axis=1)
    return float(np.mean(products / norms))


def relative_error(values: Logits, reference: Logits) -> float:
    """Mean over positions of ‖values − reference‖ / ‖reference‖ of logits [T, V]."""
    return float(np.mean(np.linalg.norm(values - reference, axis=1) / np.linalg.norm(reference, axis=1)))


def ratios(engines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Our speeds by each peer's: above 1 we are faster. Each is the median over rounds of the ratio within a round."""
    peers = [one for one in engines if one["engine"].startswith((LLAMA, TRANSFORMERS))]
    found = []
    for one in (each for each in engines if each not in peers):
        for peer in peers:
            both = {
                batch: list(zip(runs, peer["decode_runs_tokens_per_s"][batch], strict=True))
                for batch, runs in one["decode_runs_tokens_per_s"].items()
            }
            both["prefill"] = list(
                zip(one["prefill_runs_tokens_per_s"], peer["prefill_runs_tokens_per_s"], strict=True)
            )
            speeds = {work: statistics.median(a / b for a, b in pairs) for work, pairs in both.items()}
            found.append({"engine": one["engine"], "peer": peer["engine"], "speed": speeds})
    return found


def text(found: Mapping[str, Any]) -> str:
    """As a person reads it."""
    batches = list(found["engines"][0]["decode_tokens_per_s"])
    heads = ["engine", *(f"batch {batch}" for batch in batches), "prefill", "peak MiB", "cosine", "error"]
    rows = [
        [
            one["engine"],
            *one["decode_tokens_per_s"].values(),
            one["prefill_tokens_per_s"],
            f"{one['peak_memory_bytes'] / 2**20:.0f}",
            *("–" if one[name] is None else f"{one[name]:.4f}" for name in ("cosine", "relative_error")),
        ]
        for one in found["engines"]
    ]
    parts = ["decode and prefill in tokens/s\n" + columns(heads, rows)]
    chosen = [
        f"{one['engine']}: " + ", ".join(f"{work} with {name}" for work, name in one["variant"].items())
        for one in found["engines"]
        if len(one["variants_tokens_per_s"]) > 1
    ]
    if chosen:
        parts.append("variants, the fastest of those tried\n" + "\n".join(chosen))
    if found["ratios"]:
        shown = [
            [f"{one['engine']} / {one['peer']}", *(f"{value:.2f}" for value in one["speed"].values())]
            for one in found["ratios"]
        ]
        parts.append(columns(["ratio of speeds", *heads[1 : len(batches) + 2]], shown))
    return "\n\n".join(parts)
