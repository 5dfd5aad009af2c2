"""Our engine, transformers and llama.cpp on the same weights, prompts and threads, in turns."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders.build import Options, build
from builders.model_config import read_model_config
from builders.quantize import Precision
from client.bench.peers.install import install_llama, require_torch
from client.bench.peers.protocol import Prompt, Worker, environment
from client.bench.report import columns
from client.bench.suite import Plan
from python_backends.errors import BuildError

LLAMA, TRANSFORMERS, REFERENCE = "llama.cpp", "transformers", "transformers float32"
GGUF_TYPES = ("q4_0", "q8_0")
LOGIT_TOKENS = 96
"""Length of the prompt whose logits are compared, at every position."""
FIRST_WORD = 512
"""Token ids before it are bytes, characters and control tokens."""


@dataclass(frozen=True)
class Setup:
    """What to compare."""

    checkpoint: Path
    folder: Path
    """Keeps packages, GGUF files and our builds from run to run."""
    ours: tuple[Precision, ...]
    without: frozenset[str]
    threads: int
    plan: Plan


def compare(setup: Setup, report: Any) -> dict[str, Any]:
    """Decode and prefill speeds, peak memory, and the cosine of the logits with transformers in float32.

    Args:
        setup: what and how.
        report: called with a line of text when something is about to be done.

    Raises:
        BuildError: a peer cannot be installed, or the checkpoint not be built.
        ServerUnavailableError: a peer failed; the message names its log.
    """
    prompts = _prompts(setup)
    with ExitStack() as opened:
        workers = [opened.enter_context(worker) for worker in _workers(setup, report)]
        times = _times(workers, setup.plan, prompts, report)
        memory = {worker.name: worker.call("memory") for worker in workers}
        probe = prompts.pop("probe")[0]
        logits = {}
        for worker in workers:
            report(f"logits, {worker.name} …")
            logits[worker.name] = worker.logits(probe, setup.folder)
            worker.close()
        if TRANSFORMERS not in setup.without:
            report(f"logits, {REFERENCE} …")
            with _transformers(setup, REFERENCE, "float32") as reference:
                wanted = reference.logits(probe, setup.folder)
            cosines = {name: cosine(values, wanted) for name, values in logits.items()}
        else:
            cosines = {}
    return {
        "engines": [
            {"engine": name, **figures, "peak_memory_bytes": memory[name], "cosine": cosines.get(name)}
            for name, figures in times.items()
        ]
    }


def _prompts(setup: Setup) -> dict[str, list[Prompt]]:
    vocabulary = read_model_config(setup.checkpoint).text.vocab_size
    rng = np.random.default_rng(setup.plan.seed)

    def draw(count: int, tokens: int) -> list[Prompt]:
        return [list(map(int, ids)) for ids in rng.integers(FIRST_WORD, vocabulary * 9 // 10, (count, tokens))]

    return {
        "decode": draw(max(setup.plan.batches), setup.plan.prompt_tokens),
        "prefill": draw(setup.plan.repeats + 1, setup.plan.prefill_tokens),
        "probe": draw(1, LOGIT_TOKENS),
    }


def _times(
    workers: Sequence[Worker], plan: Plan, prompts: Mapping[str, list[Prompt]], report: Any
) -> dict[str, dict[str, Any]]:
    """The first round warms up and does not count."""
    prefills: dict[str, list[float]] = {worker.name: [] for worker in workers}
    steps: dict[str, dict[int, list[float]]] = {
        worker.name: {batch: [] for batch in plan.batches} for worker in workers
    }
    for number in range(plan.repeats + 1):
        for worker in workers:
            report(f"prefill, {worker.name}, run {number} of {plan.repeats} …")
            seconds = worker.call("prefill", prompt=prompts["prefill"][number])
            if number:
                prefills[worker.name].append(len(prompts["prefill"][number]) / seconds)
        for batch in plan.batches:
            for worker in workers:
                report(f"decoding, batch {batch}, {worker.name}, run {number} of {plan.repeats} …")
                tokens = plan.output_tokens if number else 4
                found = worker.call("decode", prompts=prompts["decode"][:batch], tokens=tokens)
                if number:
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


def cosine(values: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Mean over positions of the cosine between two rows of logits [T, V]."""
    products = np.einsum("tv,tv->t", values, reference, dtype=np.float64)
    norms = np.linalg.norm(values, axis=1) * np.linalg.norm(reference, axis=1)
    return float(np.mean(products / norms))


# --- the workers ------------------------------------------------------------------------------------------------------


def _workers(setup: Setup, report: Any) -> list[Worker]:
    """Processes with their engines loaded. They are few hundred megabytes to a few gigabytes each, all at once."""
    context = 64 + max(setup.plan.prompt_tokens + setup.plan.output_tokens, setup.plan.prefill_tokens + 1)
    sizes = [str(setup.threads), str(max(setup.plan.batches)), str(context)]
    workers = []
    for precision in setup.ours:
        name = f"wicore {label(precision)}"
        report(f"building {name} …")
        kind = label(precision).replace(":", "-")
        repository = setup.folder / "repositories" / f"{setup.checkpoint.resolve().name}-{kind}"
        build(setup.checkpoint, repository, Options(precision))
        workers.append(_worker(setup, name, "wicore_worker", [str(repository), *sizes]))
    if LLAMA not in setup.without:
        report("installing llama.cpp (it is compiled, which takes minutes) …")
        packages = install_llama(setup.folder / "peers")
        for kind, path in _gguf(setup, packages, report).items():
            report(f"loading {LLAMA} {kind} …")
            arguments = [str(path), *sizes]
            workers.append(_worker(setup, f"{LLAMA} {kind}", "llama_worker", arguments, [packages]))
    if TRANSFORMERS not in setup.without:
        require_torch()
        report("loading transformers …")
        workers.append(_transformers(setup, f"{TRANSFORMERS} bf16", "bfloat16"))
    if not workers:
        raise BuildError("nothing is left to measure")
    return workers


def label(precision: Precision) -> str:
    """As `--ours` takes it."""
    kind = f"{precision.name}:{precision.block}" if precision.quantized else precision.name
    return kind if precision.symmetric else f"{kind}:asymmetric"


def read_label(text: str) -> Precision:
    """``int4:32``, ``int8``, ``int4:128:asymmetric``, ``fp32`` …

    Raises:
        BuildError: anything else.
    """
    name, _, rest = text.partition(":")
    block, _, kind = rest.partition(":")
    if (block and not block.isdigit()) or kind not in {"", "asymmetric"}:
        raise BuildError(f"{text!r} is no precision; write int4:32, int8, int4:128:asymmetric or fp32")
    return Precision(name, int(block or 32), not kind)  # type: ignore[arg-type]


def _transformers(setup: Setup, name: str, dtype: str) -> Worker:
    return _worker(setup, name, "transformers_worker", [str(setup.checkpoint), dtype, str(setup.threads)])


def _worker(setup: Setup, name: str, module: str, arguments: list[str], folders: Sequence[Path] = ()) -> Worker:
    log = setup.folder / "logs" / f"{name.replace(' ', '-').replace(':', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    return Worker(name, f"client.bench.peers.{module}", arguments, folders=folders, threads=setup.threads, log=log)


def _gguf(setup: Setup, packages: Path, report: Any) -> dict[str, Path]:
    """The checkpoint in llama.cpp's formats, written once."""
    folder = setup.folder / "gguf" / setup.checkpoint.resolve().name
    files = {kind: folder / f"{kind}.gguf" for kind in GGUF_TYPES}
    newest = (setup.checkpoint / "config.json").stat().st_mtime
    if all(path.exists() and path.stat().st_mtime > newest for path in files.values()):
        return files
    report("writing GGUF files …")
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "client.bench.peers.gguf_files", str(setup.checkpoint), str(folder)]
    done = subprocess.run(
        [*command, str(setup.threads), *GGUF_TYPES],
        env=environment([packages], setup.threads),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise BuildError(f"cannot write GGUF files of {setup.checkpoint}: {reason}")
    return files


def text(found: Mapping[str, Any]) -> str:
    """As a person reads it."""
    batches = list(found["engines"][0]["decode_tokens_per_s"])
    heads = ["engine", *(f"batch {batch}" for batch in batches), "prefill", "peak MiB", "cosine"]
    rows = [
        [
            one["engine"],
            *one["decode_tokens_per_s"].values(),
            one["prefill_tokens_per_s"],
            f"{one['peak_memory_bytes'] / 2**20:.0f}",
            "–" if one["cosine"] is None else f"{one['cosine']:.4f}",
        ]
        for one in found["engines"]
    ]
    return "decode and prefill in tokens/s\n" + columns(heads, rows)
