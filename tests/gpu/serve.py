"""End to end on a card: a real tritonserver with the decoder on the GPU: `python -m tests.gpu.serve --out FOLDER`.

Needs what `pip install -e '.[tensorrt-rtx]'` installs. The sections:

- ``demo``: the demo checkpoint in every precision, its held-out set through Triton and the share of equal answers to
  transformers in float32, and the logits' relative error in this process (PyTorch and transformers for that).
- ``load``: a random checkpoint of ``--shape`` in ``--precision``, closed loops and the cost of Triton.

A precision followed by ``+plans`` runs TensorRT-RTX plans between attentions and for the vision tower.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from builders.build import Options, build
from builders.checkpoint import open_checkpoint
from builders.demo.evaluate import BatchAnswerFn, Request, evaluate_batches, transformers_answerer
from builders.quantize import Precision
from client.commands.demo import checkpoint_folder, server_answerer
from client.server import Server, ServerOptions
from python_backends import manifest
from python_backends.config import load as load_config
from python_backends.decoder.open import open_runtime
from tests.driver import step_inputs
from tests.gpu.report import Report
from tests.reference import reference

PRECISIONS = ("bf16", "bf16+plans", "fp16", "fp16+plans", "fp8", "int8", "int4")
LOADS = (1, 8, 16)


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
            try:
                run(report, options)
            except Exception as error:
                traceback.print_exc()
                report.row("failed", part=section, error=f"{type(error).__name__}: {error}"[:600])


@contextmanager
def built(checkpoint: Path, precision: str, **settings: object) -> Iterator[Path]:
    """A repository for the GPU."""
    precision, _, plans = precision.partition("+")
    block = {"int8": (0,), "int4": (128,)}.get(precision, ())
    settings["enable_kernel_fusion"] = not plans
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model_repository"
        build(checkpoint, folder, Options(Precision.of(precision, *block), manifest.TENSORRT_RTX, plans=bool(plans)))
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
        try:
            _demo_in(report, checkpoint, precision, options, wanted)
        except Exception as error:
            traceback.print_exc()
            report.row("failed", part=f"demo {precision}", error=f"{type(error).__name__}: {error}"[:600])


def _demo_in(report: Report, checkpoint: Path, precision: str, options: argparse.Namespace, wanted: Kept) -> None:
    with built(checkpoint, precision, max_batch_size=16, max_context_length=4096) as folder:
        error, greedy = _logits_error(checkpoint, folder)
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


def load(report: Report, options: argparse.Namespace) -> None:
    """`wicore bench serve` on a random checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / f"random-{options.shape}"
        _wicore("random-checkpoint", options.shape, str(checkpoint))
        with built(checkpoint, options.precision, max_batch_size=16, max_context_length=4096) as folder:
            batches = [text for batch in LOADS for text in ("--batch", str(batch))]
            found = _wicore("bench", "serve", "--repository", str(folder), *batches, "--requests", "48", "--json")
    for line in found.splitlines():
        report.row("load", **json.loads(line))


def _wicore(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "client.cli", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"wicore {arguments[0]}: {done.stdout[-600:]} {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
