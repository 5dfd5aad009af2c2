"""Small models of every family on the card, beside transformers in float32 on the same weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from builders.checkpoint import open_checkpoint
from builders.gpu_weights import write_gpu_weights
from builders.quantize import Precision
from python_backends.runtime.gpu.compile import KernelCache
from python_backends.runtime.gpu.cuda import CudaDevice
from python_backends.runtime.gpu.decoder import GpuDecoder, GpuOptions
from python_backends.runtime.gpu.device_weights import load_weights
from python_backends.runtime.gpu.weights import open_weights
from tests.checkpoints import FIRST_TEXT, IMAGE, tiny
from tests.driver import model_shape, step_inputs
from tests.gpu.report import Report
from tests.reference import reference

PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8", "int4")


def parity(report: Report, kernels: KernelCache) -> None:
    """Logits of a prompt in chunks and of decoded tokens: relative error and the share of equal greedy tokens."""
    for family in ("1b", "4b"):
        for precision in PRECISIONS if family == "1b" else ("fp32", "bf16"):
            _one(report, kernels, family, precision)


def _one(report: Report, kernels: KernelCache, family: str, precision: str) -> None:
    checkpoint = tiny(family)
    opened = open_checkpoint(checkpoint)
    rng = np.random.default_rng(0)
    ids = rng.integers(FIRST_TEXT, IMAGE, 260).tolist()
    wanted = reference(checkpoint).logits(np.array(ids))
    with tempfile.TemporaryDirectory() as folder:
        block = {"int8": (0,), "int4": (128,)}.get(precision, ())
        write_gpu_weights(opened, Precision.of(precision, *block), Path(folder))
        device = CudaDevice(kernels)
        weights = load_weights(device, open_weights(Path(folder)))
        decoder = GpuDecoder(device, model_shape(opened.config), weights, GpuOptions(3, 512, 2 << 30, 256))
    found = [decoder.step(step_inputs(1, [ids[:200]], [0]), want_logits=True).logits[0]]
    found.append(decoder.step(step_inputs(1, [ids[200:240]], [200]), want_logits=True).logits[0])
    tokens = []
    for past in range(240, 260):
        outputs = decoder.step(step_inputs(0, [[], [ids[past]], []], [0, past, 0]), want_logits=True)
        found.append(outputs.logits[1])
        tokens.append(int(outputs.next_token[1, 0]))
    logits = np.concatenate(found)
    report.row(
        "parity",
        family=family,
        precision=precision,
        relative_error=float(np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)),
        largest=float(np.abs(logits - wanted).max() / np.abs(wanted).max()),
        equal=float((logits.argmax(-1) == wanted.argmax(-1)).mean()),
        greedy=float(np.mean(np.array(tokens) == logits[240:].argmax(-1))),
    )
    assert sum(len(part) for part in found) == len(wanted)
    decoder.close()
