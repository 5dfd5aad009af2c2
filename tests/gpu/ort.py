"""ONNX Runtime's CUDA provider on a card, without Triton: `python -m tests.gpu.ort --out FOLDER`.

Small models of two families, with images, in every precision, beside transformers in float32 on the same weights:
the error of the logits (also to the same graph on the CPU) and the share of equal greedy tokens; whether a sequence
goes on bit for bit from its blocks and its tail in another slot; and, from a profile, which nodes ran on the CPU and
the largest of what was copied between the two. Each runs in a process of its own, so that a crash leaves the others
alone. Needs what ``wicore[cuda]`` installs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from builders.checkpoint import open_checkpoint
from builders.quantize import Precision, PrecisionName
from python_backends.config import Config
from python_backends.errors import ArtifactError
from python_backends.runtime.onnxruntime import OnnxRuntimeDecoder, OnnxRuntimeVision
from python_backends.runtime.providers import CUDA, missing_for_cuda
from tests.checkpoints import tiny
from tests.driver import Driver, artefacts, decoder_as_on_gpu, model_shape, step_inputs
from tests.gpu.report import Report
from tests.gpu.serve import isolated
from tests.prompts import Prompt, prompt
from tests.reference import reference

PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "fp16", "bf16", "int8", "int4")
SLOTS, CONTEXT, BLOCK = 3, 512, 16
CUTS = [[100, 230], [20]]
ACCURACY = 0
"""Of MatMulNBits: on the CPU activations keep their bits, too, as they do on a GPU."""


def main() -> None:
    """Every family and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the raw results")
    parser.add_argument("precisions", nargs="*", default=list(PRECISIONS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out / "gpu-onnxruntime.json", {"onnxruntime": onnxruntime.__version__})
    for precision in options.precisions:
        for family in ("1b", "4b"):
            try:
                report.row("onnxruntime", family=family, precision=precision, **isolated(measure, family, precision))
            except Exception as error:
                traceback.print_exc()
                report.row("failed", part=f"{family} {precision}", error=f"{type(error).__name__}: {error}"[:1500])


def measure(family: str, precision: PrecisionName) -> dict[str, Any]:
    """One model in one precision, opened on the GPU."""
    if missing := missing_for_cuda():
        raise ArtifactError(missing)
    from python_backends.runtime.gpu.open import open_device

    checkpoint, profile = tiny(family), Path(tempfile.mkdtemp()) / "profile"
    onnxruntime.InferenceSession = partial(_profiled, onnxruntime.InferenceSession, str(profile))
    folder = artefacts(checkpoint, Precision.of(precision), ACCURACY)
    decoder = OnnxRuntimeDecoder(
        folder,
        model_shape(open_checkpoint(checkpoint).config),
        num_slots=SLOTS,
        max_context_length=CONTEXT,
        memory_limit=2**30,
        block_tokens=BLOCK,
        provider=CUDA,
        device=open_device(Path(tempfile.mkdtemp()), Config()),
    )
    has_images = decoder.spec.image_token_id is not None
    encoder = OnnxRuntimeVision(folder, provider=CUDA) if has_images else None
    items = [
        prompt(checkpoint, np.random.default_rng(3), text=260, pictures=2 * has_images),
        prompt(checkpoint, np.random.default_rng(4), text=40),
    ]
    driver = Driver(decoder, items, encoder)
    driver.prefill(CUTS)
    driver.decode(12)
    compared = [_compared(checkpoint, item, driver, row) for row, item in enumerate(items)]
    same = _resumes(decoder, items[1])
    found = {
        "relative_error": max(error for error, _ in compared),
        "equal_greedy": min(equal for _, equal in compared),
        "relative_to_cpu": None if precision == "bf16" else _to_cpu(checkpoint, Precision.of(precision), driver),
        "resumes_bit_for_bit": same,
        **_placed(Path(decoder._session.end_profiling())),
    }
    decoder.close()
    return found


def _profiled(create: Any, prefix: str, model: Any, options: Any, **arguments: Any) -> Any:
    options.enable_profiling = True
    options.profile_file_prefix = prefix
    return create(model, options, **arguments)


def _compared(checkpoint: Path, item: Prompt, driver: Driver, row: int) -> tuple[float, float]:
    """(norm of the difference over the norm, share of equal largest logits) of a prompt and what was drawn."""
    ids = [*item.ids, *driver.tokens[row][:-1]]
    found = np.array(driver.logits[row])
    wanted = reference(checkpoint).logits(np.array(ids), item.pixels)
    equal = float((found.argmax(-1) == wanted.argmax(-1)).mean())
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)), equal


def _to_cpu(checkpoint: Path, precision: Precision, driver: Driver) -> float:
    """The prompts' error against the same graph on the CPU, norm over norm: what quantization costs is in both."""
    runtime = decoder_as_on_gpu(checkpoint, precision, num_slots=SLOTS, context=CONTEXT, accuracy_level=ACCURACY)
    on_cpu = Driver(runtime, driver.prompts)
    on_cpu.features = driver.features
    on_cpu.prefill(CUTS)
    errors = []
    for wanted, found in zip(on_cpu.logits, driver.logits, strict=True):
        errors.append(np.linalg.norm(np.array(found)[: len(wanted)] - wanted) / np.linalg.norm(wanted))
    return float(max(errors))


def _resumes(decoder: OnnxRuntimeDecoder, item: Prompt) -> bool:
    """Whether what follows is bit for bit the same after blocks and tail went out and into another slot."""
    length, follow = len(item.ids), [[7], [8], [9]]
    decoder.step(step_inputs(0, [item.ids], [0]))
    layout = decoder.kv_layout
    blocks = [memoryview(bytearray(layout.block_bytes)) for _ in range(length // BLOCK)]
    for index, block in enumerate(blocks):
        decoder.export_block(0, index * BLOCK, block)
    tail = memoryview(bytearray(layout.tail_bytes(length)))
    decoder.export_tail(0, length, tail)
    wanted = [_logits(decoder, 0, ids, length + at) for at, ids in enumerate(follow)]
    decoder.import_blocks(2, blocks, tail, length)
    found = [_logits(decoder, 2, ids, length + at) for at, ids in enumerate(follow)]
    return bool(np.array_equal(found, wanted))


def _logits(decoder: OnnxRuntimeDecoder, slot: int, ids: list[int], past: int) -> NDArray[np.float32]:
    logits = decoder.step(step_inputs(slot, [ids], [past]), want_logits=True).logits
    assert logits is not None
    return logits[0]


def _placed(profile: Path) -> dict[str, Any]:
    """What ran on the CPU, and the largest that was copied between it and the GPU (bytes)."""
    events = [event["args"] for event in json.loads(profile.read_text()) if event["name"].endswith("_kernel_time")]
    copies = [int(event.get("output_size", 0)) for event in events if event["op_name"].startswith("Memcpy")]
    on_cpu = Counter(event["op_name"] for event in events if event.get("provider") == "CPUExecutionProvider")
    return {"largest_copy_bytes": max(copies, default=0), "on_cpu": dict(on_cpu)}


if __name__ == "__main__":
    main()
