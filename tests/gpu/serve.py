"""End to end on a card: a real tritonserver with the decoder on the GPU: `python -m tests.gpu.serve --out FOLDER`.

Needs what `pip install -e '.[tensorrt-rtx]'` installs. The sections:

- ``demo``: the demo checkpoint in every precision, its held-out set through Triton and the share of equal answers to
  transformers in float32, and the logits' relative error in this process (PyTorch and transformers for that).
- ``load``: a random checkpoint of ``--shape`` in ``--precision``: the GPU's own time of a decode step, the cost of the
  engine and of Triton (`wicore bench serve`), and closed loops of 1, 8 and 16 streams with the GPU's utilisation.

A precision followed by ``+plans`` runs TensorRT-RTX plans between attentions and for the vision tower; one followed by
``+onnxruntime`` is a build for ONNX Runtime, run by its CUDA provider (needs what ``wicore[cuda]`` installs).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from builders.build import Options, build
from builders.checkpoint import open_checkpoint
from builders.demo.evaluate import BatchAnswerFn, Request, evaluate_batches, transformers_answerer
from builders.quantize import Precision
from client.bench.prompts import Prompts
from client.bench.suite import Plan, closed, warm_up
from client.bench.targets import ServerTarget
from client.commands.demo import checkpoint_folder, server_answerer
from client.server import Server, ServerOptions
from python_backends import manifest
from python_backends.config import load as load_config
from python_backends.decoder.open import open_runtime
from python_backends.runtime.gpu.decoder import GpuDecoder
from tests.driver import step_inputs
from tests.gpu.report import Report
from tests.gpu.steps import event_ms, graphs_of, greedy_inputs
from tests.gpu.utilisation import Utilisation
from tests.reference import reference

PRECISIONS = ("bf16", "bf16+plans", "fp16", "fp16+plans", "fp8", "int8", "int4")
LOADS = {1: 32, 8: 160, 16: 256}
"""Concurrent streams, and requests of a closed loop: enough for NVML to see it."""
PROMPT_TOKENS, ANSWER_TOKENS = 128, 64
CPU_MEMORY_GB = 4
"""For kept KV: locking more host memory takes a server's start longer than loading the weights."""
Result = TypeVar("Result")


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the raw results")
    parser.add_argument("--shape", default="4b")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--conversations", type=int, default=40)
    parser.add_argument("--precisions", nargs="*", default=list(PRECISIONS))
    parser.add_argument("sections", nargs="*", default=["demo", "load"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out / "gpu-serve.json", {})
    for section, run in (("demo", demo), ("load", load)):
        if section in options.sections:
            report.guard(section, lambda run=run: run(report, options))


@contextmanager
def built(checkpoint: Path, precision: str, **settings: object) -> Iterator[Path]:
    """A repository for the GPU."""
    precision, _, variant = precision.partition("+")
    settings = {"cpu_memory_gb": CPU_MEMORY_GB, **settings}
    if variant == "onnxruntime":
        options = Options(Precision.of(precision), manifest.ONNXRUNTIME)
        settings["execution_provider"] = "cuda"
    else:
        block = {"int8": (0,), "int4": (128,)}.get(precision, ())
        options = Options(Precision.of(precision, *block), manifest.TENSORRT_RTX, plans=bool(variant))
        settings["enable_kernel_fusion"] = not variant
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model_repository"
        build(checkpoint, folder, options)
        (folder / "wicore.json").write_text(json.dumps(settings))
        yield folder


def demo(report: Report, options: argparse.Namespace) -> None:
    """Answers of the small trained model."""
    checkpoint = checkpoint_folder()
    wanted = Kept(transformers_answerer(checkpoint, "cuda"))
    reference_report = evaluate_batches(wanted, options.conversations, 0, 64, progress=False)
    report.row(
        "demo",
        engine="transformers float32",
        accuracy=reference_report.accuracy,
        questions=reference_report.questions,
    )
    for precision in options.precisions:
        report.guard(f"demo {precision}", lambda p=precision: _demo_in(report, checkpoint, p, options, wanted))


def _demo_in(report: Report, checkpoint: Path, precision: str, options: argparse.Namespace, wanted: Kept) -> None:
    with built(checkpoint, precision, max_batch_size=16, max_context_length=4096) as folder:
        # A fault of ONNX Runtime's may end the process.
        measure = partial(isolated, _logits_error) if precision.endswith("+onnxruntime") else _logits_error
        error, greedy = measure(checkpoint, folder)
        began = time.monotonic()
        with Server(ServerOptions(folder, http_port=0, grpc_port=0, metrics_port=0)) as server:
            started = time.monotonic() - began
            with server_answerer(server.addresses.grpc) as answer:
                said = Kept(answer)
                found = evaluate_batches(said, options.conversations, 0, 64, progress=False)
            server.check()
    report.row(
        "demo",
        engine=f"tritonserver {precision}",
        accuracy=found.accuracy,
        questions=found.questions,
        same_answer=said.agreement(wanted),
        relative_logit_error=error,
        same_greedy_token=greedy,
        start_s=started,
        seconds=time.monotonic() - began - started,
    )


class Kept:
    """An answerer that remembers what was asked and said."""

    def __init__(self, answer: BatchAnswerFn) -> None:
        self._answer = answer
        self._said: dict[str, str] = {}

    def __call__(self, requests: Sequence[Request]) -> list[str]:
        answers = self._answer(requests)
        keys = [json.dumps([messages, [hash(image.tobytes()) for image in images]]) for messages, images in requests]
        self._said.update(zip(keys, answers, strict=True))
        return answers

    def agreement(self, other: Kept) -> float:
        """Share of equal answers among what both were asked: a turn after unequal answers is another question."""
        common = self._said.keys() & other._said.keys()
        return sum(self._said[key] == other._said[key] for key in common) / max(1, len(common))


def _logits_error(checkpoint: Path, folder: Path) -> tuple[float, float]:
    """Of a text longer than the window, in two chunks: (norm of the difference over the norm, equal largest logits)."""
    config = open_checkpoint(checkpoint).config.text
    settings = dataclasses.replace(load_config(folder), max_batch_size=2, max_context_length=2048)
    ids = np.random.default_rng(0).integers(300, config.vocab_size - 100, 900).tolist()
    wanted = reference(checkpoint).logits(np.array(ids))
    runtime = open_runtime(manifest.load(folder), settings)
    try:
        chunks = ((0, 512), (512, 900))
        parts = [runtime.step(step_inputs(1, [ids[a:b]], [a]), want_logits=True).logits for a, b in chunks]
    finally:
        runtime.close()
    found = np.concatenate([part[0] for part in parts if part is not None])
    equal = float((found.argmax(-1) == wanted.argmax(-1)).mean())
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)), equal


def isolated(run: Callable[..., Result], *arguments: object) -> Result:
    """A call in a process of its own: what it takes of the GPU goes with it, and a crash is an exception here."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def load(report: Report, options: argparse.Namespace) -> None:
    """A random checkpoint: a step's graphs alone, `wicore bench serve`, and closed loops with the GPU watched."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / f"random-{options.shape}"
        began = time.monotonic()
        _wicore("random-checkpoint", options.shape, str(checkpoint))
        made = time.monotonic()
        with built(checkpoint, options.precision, max_batch_size=max(LOADS), max_context_length=4096) as folder:
            report.row("load", checkpoint_s=made - began, build_s=time.monotonic() - made)
            graphs: dict[int, float] = {}
            report.guard("load: graphs", lambda: graphs.update(_graph_ms(report, folder)))
            report.guard("load: bench serve", lambda: _bench_serve(report, folder, options.out, graphs))
            report.guard("load: streams", lambda: _streams(report, folder, graphs))


def _graph_ms(report: Report, folder: Path) -> dict[int, float]:
    """Milliseconds of a decode step's graphs on the GPU, by batch, in the middle of the loads' answers."""
    settings = load_config(folder)
    began = time.monotonic()
    decoder = open_runtime(manifest.load(folder), settings)
    report.row("load", open_decoder_s=time.monotonic() - began)
    assert isinstance(decoder, GpuDecoder)
    try:
        found = {}
        for batch in LOADS:
            inputs = greedy_inputs(decoder.spec.vocab_size, batch, PROMPT_TOKENS + ANSWER_TOKENS // 2)
            graphs = graphs_of(decoder, inputs)
            found[batch] = event_ms(decoder._device, lambda replay=graphs: [graph.replay() for graph in replay])
            report.row("load", batch=batch, graph_ms=found[batch])
        return found
    finally:
        decoder.close()


def _bench_serve(report: Report, folder: Path, out: Path, graphs: dict[int, float]) -> None:
    """The engine alone and through Triton, in turns; everything that the command says goes into a file."""
    batches = [text for batch in LOADS for text in ("--batch", str(batch))]
    sizes = ("--prompt-tokens", str(PROMPT_TOKENS), "--output-tokens", str(ANSWER_TOKENS), "--requests", "48")
    text = _wicore("bench", "serve", "--repository", str(folder), *batches, *sizes, "--json")
    (out / "gpu-bench-serve.json").write_text(text)
    found = json.loads(text)
    for index, batch in enumerate(LOADS):
        steps = {name: target["decode"][index]["step_ms"] for name, target in found["targets"].items()}
        graph = graphs.get(batch, float("nan"))
        report.row(
            "load-decode",
            batch=batch,
            graph_ms=graph,
            **{f"{name}_step_ms": step for name, step in steps.items()},
            **{f"{name}_not_the_graphs": 1 - graph / step for name, step in steps.items()},
            **{f"cost_{name}": value for name, value in found["cost"][index].items() if name != "batch"},
        )
    for name, target in found["targets"].items():
        report.row("load-prefill", target=name, **target["prefill"])


def _streams(report: Report, folder: Path, graphs: dict[int, float]) -> None:
    """Closed loops through Triton."""
    with Server(ServerOptions(folder, http_port=0, grpc_port=0, metrics_port=0)) as server:
        target, prompts = ServerTarget(server.addresses.grpc), Prompts(folder, 1)
        try:
            warm_up(target, prompts, Plan(PROMPT_TOKENS, ANSWER_TOKENS, batches=tuple(LOADS)))
            for streams, requests in LOADS.items():
                plan = Plan(PROMPT_TOKENS, ANSWER_TOKENS, batches=(streams,), requests=requests)
                with Utilisation() as gpu:
                    found = closed(target, prompts, plan, streams)
                steps = found.pop("steps")
                graph = graphs.get(streams, float("nan"))
                report.row(
                    "load-streams",
                    **found,
                    gpu_percent=gpu.mean,
                    graph_ms=graph,
                    not_the_graphs=1 - graph / found["inter_token_p50_ms"],
                    of_a_step_not_the_graphs=1 - graph / steps["decode_step_ms"],
                    **{f"engine_{name}": value for name, value in steps.items()},
                )
            server.check()
        finally:
            target.close()


def _wicore(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "client.cli", *arguments], capture_output=True, text=True, check=False, timeout=420
    )
    if done.returncode:
        raise RuntimeError(f"wicore {arguments[0]}: {done.stdout[-600:]} {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
