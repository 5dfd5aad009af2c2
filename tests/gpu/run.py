"""Everything that needs a card, in one go: `python -m tests.gpu.run --out FOLDER`.

Needs cuda-bindings, triton==3.6.0 (to compile kernels), for the parity section PyTorch and transformers, and for the
sections plans and vision (not among the default ones) tensorrt-rtx-cu13 as well. Prints rows as they come and keeps
them in ``gpu-….json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from builders.model_config import ModelConfig, read_model_config
from builders.random_checkpoint import shape_config
from python_backends.runtime.gpu.compile import KernelCache
from python_backends.runtime.gpu.cuda import CudaDevice
from tests.driver import model_shape
from tests.gpu import plans
from tests.gpu.parity import parity
from tests.gpu.report import Report
from tests.gpu.sampling import sampling_times
from tests.gpu.steps import Bench, copy_rate

DECODE = [(batch, context) for context in (1024, 8192) for batch in (1, 4, 8, 16)]
LONG = [(1, 32_768), (4, 32_768), (1, 131_072)]


def main() -> None:
    """Run the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the raw results")
    parser.add_argument("--kernels", type=Path, help="folder of compiled kernels, kept from run to run")
    parser.add_argument("--shape", default="27b")
    parser.add_argument("--layers", type=int, help="the first layers alone")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--kv", default="", help="element type of the KV: fp8e4nv, or that of the activations")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("sections", nargs="*", default=["parity", "sampling", "decode", "prefill", "breakdown"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kernels = KernelCache(options.kernels or Path(tempfile.gettempdir()) / "wicore-kernels")
    device = CudaDevice(kernels)
    name = f"gpu-{options.shape}-{options.layers or 'all'}-{options.precision}{options.kv}"
    report = Report(options.out / f"{name}.json", {"gpu": device.name, "capability": device.capability})
    report.row("machine", gpu=device.name, copy_tb_s=copy_rate(device) / 1e12)
    device.close()
    if "parity" in options.sections:
        _guard(report, "parity", lambda: parity(report, kernels))
    if "sampling" in options.sections:
        _guard(report, "sampling", lambda: sampling_times(report, kernels))
    if "plans" in options.sections:
        _guard(report, "plans", lambda: plans.pieces(report, kernels, _config(options.shape, 2), options.precision))
    if "vision" in options.sections:
        _guard(report, "vision", lambda: plans.vision(report, kernels, options.precision))
    if set(options.sections) - {"parity", "sampling", "plans", "vision"}:
        _guard(report, "steps", lambda: steps(report, kernels, options))


def _config(shape: str, layers: int | None) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape_config(shape, layers)))
        return read_model_config(Path(folder))


def steps(report: Report, kernels: KernelCache, options: argparse.Namespace) -> None:
    """Times of decode steps and of chunks of prompts."""
    config = _config(options.shape, options.layers)
    device = CudaDevice(kernels)
    bench = Bench.open(
        device,
        model_shape(config),
        config.text,
        options.precision,
        slots=options.slots,
        context=options.context,
        chunk=2048,
        kv_dtype=options.kv,
    )
    spec = bench.decoder.spec
    report.row(
        "memory",
        weights_gb=bench.weights.num_bytes / 1e9,
        slots=spec.num_slots,
        context=spec.max_context_length,
        allocated_gb=device.allocated_bytes / 1e9,
        copy_tb_s=bench.bytes_per_second / 1e12,
    )
    for batch, context in DECODE + LONG:
        if "decode" in options.sections and batch <= spec.num_slots and context <= spec.max_context_length:
            _guard(report, "decode", lambda b=batch, c=context: bench.decode(report, "decode", b, c))
    for tokens, past in ((512, 0), (2048, 0), (2048, 4096)):
        if "prefill" in options.sections and past + tokens <= spec.max_context_length:
            _guard(report, "prefill", lambda t=tokens, p=past: bench.prefill(report, "prefill", t, p))
    if "breakdown" in options.sections:
        for batch, context, tokens in ((1, 1024, 1), (16, 8192, 1), (1, 4096, 2048)):
            if batch <= spec.num_slots and context <= spec.max_context_length:
                _guard(
                    report,
                    "breakdown",
                    lambda b=batch, c=context, t=tokens: bench.breakdown(report, f"breakdown-{b}-{c}-{t}", b, c, t),
                )
    report.row("end", allocated_gb=device.allocated_bytes / 1e9)
    bench.decoder.close()


def _guard(report: Report, section: str, run: Callable[[], None]) -> None:
    """A section that fails says so and lets the others run."""
    try:
        run()
    except Exception as error:
        traceback.print_exc()
        report.row("failed", part=section, error=f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
