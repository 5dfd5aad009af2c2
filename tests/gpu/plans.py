"""TensorRT plans on a card: pieces of the decoder beside our own kernels on the same weights, and the vision tower.

The floor of a piece is the time to read its matrices at the rate of a plain device copy. The matrix rate is that of a
large bfloat16 product of PyTorch's in the same run.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from builders.checkpoint import open_checkpoint
from builders.gpu_plans import PlanWriter
from builders.model_config import ModelConfig
from builders.plan import PlanBuilder
from builders.quantize import PrecisionName
from builders.random_checkpoint import shape_config, write_random_checkpoint
from python_backends.runtime.gpu.compile import KernelCache
from python_backends.runtime.gpu.cuda import CudaDevice
from python_backends.runtime.gpu.engines import inspect_engine, load_module
from python_backends.runtime.gpu.launch import DTYPES, Tensor
from python_backends.runtime.gpu.plan_execution import PlanRunner
from python_backends.runtime.gpu.plan_products import PlanProducts
from python_backends.runtime.gpu.plans import PIECES, VISION
from python_backends.runtime.gpu.products import KernelProducts
from python_backends.runtime.gpu.program import Products
from python_backends.runtime.gpu.vision import PlanVision
from python_backends.runtime.gpu.weights import Names
from tests.driver import model_shape
from tests.gpu.report import Report
from tests.gpu.steps import copy_rate, event_ms
from tests.gpu.synthetic import fill_bytes, random_weights
from tests.reference import Reference, normalized

MODULE = "tensorrt_rtx"
TOKENS = (1, 8, 16, 64, 128, 512, 2048, 4096)
BATCHES = (1, 4, 8)
_LAYERS = 2


def matrix_rate() -> float:
    """FLOP/s of a bfloat16 product [8192, 8192] · [8192, 8192]."""
    import torch

    size, repeats = 8192, 20
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        a @ b
    end.record()
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / start.elapsed_time(end) * 1e3


def pieces(report: Report, kernels: KernelCache, config: ModelConfig, precision: PrecisionName) -> None:
    """First, in between and last piece of two layers: results and times of plans and of kernels."""
    device = CudaDevice(kernels)
    rate, flops = copy_rate(device), matrix_rate()
    model, text = model_shape(config), config.text
    assert text.num_layers == _LAYERS
    weights = random_weights(device, text, precision)
    most = max(TOKENS)
    ours = KernelProducts(device, model, weights, most)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = PlanWriter(PlanBuilder(MODULE), precision).decoder(text, folder)
        began = time.perf_counter()
        plans = PlanProducts.load(device, model, weights, folder, index, most, ours)
        report.row("plans", precision=precision, load_s=time.perf_counter() - began, version=index.version)
        module = load_module(MODULE)
        for piece in PIECES:
            runner = PlanRunner(device, folder, index, piece)
            found = inspect_engine(module, runner.engine)
            report.row("inspector", piece=piece, built=index[piece].engine_layers, loaded=found)
            runner.close()
        stream, source = (device.allocate("fp32", most, text.hidden_size) for _ in range(2))
        attended = device.allocate(weights.activation, most, text.num_heads * text.head_dim)
        noise = np.random.default_rng(0).standard_normal(4 << 20, np.float32)
        fill_bytes(device, source.address, source.num_bytes, noise.view(np.uint8), 0)
        fill_bytes(device, attended.address, attended.num_bytes, noise.astype(DTYPES[attended.dtype]).view(np.uint8), 0)
        matrices = [weights.vector(Names.layer(0, kind)) for kind in Names.MATRICES]
        num_bytes = sum(matrix.num_bytes for matrix in matrices)
        width = text.num_heads * text.head_dim
        per_token = text.hidden_size * (2 * width + 2 * text.num_kv_heads * text.head_dim + 3 * text.intermediate_size)
        for tokens in TOKENS:
            part, given = stream.view(0, tokens, text.hidden_size), attended.view(0, tokens, width)
            results: dict[str, Any] = {}
            times: dict[str, float] = {}
            for who, products in (("plan", plans), ("kernels", ours)):
                results[who] = _results(device, products, part, given, source.view(0, *part.shape))
                recording = device.record(products.between(0, tokens, given, part)[0])
                times[who] = event_ms(device, recording.replay)
            report.row(
                "pieces",
                precision=precision,
                tokens=tokens,
                plan_ms=times["plan"],
                kernels_ms=times["kernels"],
                floor_share=num_bytes / rate * 1e3 / times["plan"],
                matrix_share=2 * tokens * per_token / times["plan"] * 1e3 / flops,
                **{f"{key}_error": _error(results["plan"][key], results["kernels"][key]) for key in results["plan"]},
            )
        plans.save()
        plans.close()
    device.close()


def _results(
    device: CudaDevice, products: Products, stream: Tensor, attended: Tensor, source: Tensor
) -> dict[str, Any]:
    """What each piece leaves, from the same stream: packed projections, and the stream behind the last layer."""
    tokens = stream.shape[0]
    start = device.read(source)
    steps, packed = products.first(tokens, stream)
    found: dict[str, Any] = {}
    for layer in range(_LAYERS + 1):
        recording = device.record(steps)  # issues everything once, so the stream is written anew before the replay
        device.write(stream, start)
        recording.replay()
        found[f"packed{layer}" if packed else "stream"] = _summed(device.read(packed or stream))
        if layer < _LAYERS:
            more, packed = products.between(layer, tokens, attended, stream)
            steps = [*steps, *more]
    return found


def _summed(packed: Any) -> Any:
    """Packed projections [M, N], whose parts [P, M, N] kernels of ours may leave to the next one."""
    wide = packed.astype(np.float32)
    return wide.sum(0) if wide.ndim == 3 else wide


def _error(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def vision(report: Report, kernels: KernelCache, precision: PrecisionName) -> None:
    """The published tower at 896×896: images a second, its share of the matrix rate, its distance from float32."""
    config = shape_config("27b", 1)
    text = {**config["text_config"], "vocab_size": 1024, "intermediate_size": 64}
    ids = {"boi_token_index": 1021, "eoi_token_index": 1022, "image_token_index": 1023}
    flops = matrix_rate()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_checkpoint(folder / "checkpoint", {**config, **ids, "text_config": text})
        checkpoint = open_checkpoint(folder / "checkpoint")
        sizes = checkpoint.config.vision
        assert sizes is not None
        index = PlanWriter(PlanBuilder(MODULE), precision).vision(checkpoint, folder)
        report.row(
            "vision plan", precision=precision, build_s=index[VISION].seconds, layers=index[VISION].engine_layers
        )
        pixels = np.random.default_rng(0).integers(0, 256, (max(BATCHES), 3, *[sizes.image_size] * 2), np.uint8)
        reference = Reference(folder / "checkpoint")
        wanted = _features(reference, pixels[:2])
        device = CudaDevice(kernels)
        tower = PlanVision(device, folder, index)
        found = tower.encode(pixels)
        cosine = (found[:2] * wanted).sum(-1) / np.linalg.norm(found[:2], axis=-1) / np.linalg.norm(wanted, axis=-1)
        again = np.concatenate([tower.encode(pixels[at : at + 1]) for at in range(2)])
        report.row(
            "vision", precision=precision, least_cosine=float(cosine.min()), alone_error=_error(again, found[:2])
        )
        patches, channels = sizes.patches_per_side**2, sizes.hidden_size
        per_layer = 2 * patches * channels * (4 * channels + 2 * sizes.intermediate_size) + 4 * patches**2 * channels
        for batch in BATCHES:
            recording = tower.recording(batch)
            milliseconds = event_ms(device, recording.replay)
            rate = per_layer * sizes.num_layers * batch / milliseconds * 1e3
            report.row(
                "vision",
                precision=precision,
                batch=batch,
                ms=milliseconds,
                images_per_second=batch / milliseconds * 1e3,
                tflops=rate / 1e12,
                matrix_share=rate / flops,
            )
        tower.close()


def _features(reference: Reference, pixels: Any) -> Any:
    """transformers in float32 on the card."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    model = reference.model.to("cuda")
    with torch.no_grad():
        found = model.model.get_image_features(normalized(pixels).to("cuda")).pooler_output.cpu().numpy()
    del model
    reference.model.to("cpu")
    torch.cuda.empty_cache()
    return found.reshape(len(pixels), -1, found.shape[-1])
