"""From a built repository to a decoder on the GPU."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path

from python_backends import contract
from python_backends.config import Config
from python_backends.errors import ConfigError
from python_backends.manifest import Manifest, ModelShape
from python_backends.runtime.gpu.compile import KernelCache
from python_backends.runtime.gpu.cuda import CudaDevice
from python_backends.runtime.gpu.decoder import GpuDecoder, GpuOptions
from python_backends.runtime.gpu.device_weights import DeviceWeights, load_weights
from python_backends.runtime.gpu.launch import Device
from python_backends.runtime.gpu.plan_products import PlanProducts
from python_backends.runtime.gpu.plans import open_plans
from python_backends.runtime.gpu.products import KernelProducts
from python_backends.runtime.gpu.program import Products
from python_backends.runtime.gpu.vision import PlanVision
from python_backends.runtime.gpu.warm_up import warm_up
from python_backends.runtime.gpu.weights import open_weights
from python_backends.runtime.kernels.compile import kernel_folder

FREE_SHARE = 0.92
"""Of the GPU memory that is free at start, what the decoder may take; CUDA and other stages need some beside it."""

PROGRESS_S = 5.0

_log = logging.getLogger(__name__)


def open_decoder(manifest: Manifest, config: Config) -> GpuDecoder:
    """Load the decoder that a manifest names onto the GPU.

    Raises:
        ArtifactError: no driver, no such GPU, or a file that is missing or of another version.
        ConfigError: the GPU's memory does not suffice.
    """
    began = time.monotonic()
    index = open_weights(manifest.folder(contract.DECODER))
    device = open_device(kernel_folder() / "gpu", config)
    try:
        weights = load_weights(device, index)
        make_products = _products(manifest.folder(contract.DECODER), config)
        decoder = GpuDecoder(device, manifest.model, weights, gpu_options(config, device), make_products)
        loaded = time.monotonic()
        block = config.kv_block_tokens if config.enable_hmt and config.hmt_attention_weight else 0
        compile_all = functools.partial(device.compile_all, progress=_Progress())
        recordings = warm_up(decoder, compile_all, chunk=config.prefill_chunk, attention_block=block)
        decoder.products.save()
    except BaseException:
        device.close()
        raise
    _log.info(
        "decoder: %s, loaded in %.1f s, warmed up in %.1f s, %d recordings, %.2f GB",
        device.name,
        loaded - began,
        time.monotonic() - loaded,
        recordings,
        device.allocated_bytes / 1e9,
    )
    return decoder


def _products(folder: Path, config: Config) -> Callable[[Device, ModelShape, DeviceWeights, int], Products]:
    """Kernels of ours, or plans where ``enable_kernel_fusion`` is off."""
    if config.enable_kernel_fusion:
        return KernelProducts
    index = open_plans(folder)
    if index is None:
        raise ConfigError(
            "enable_kernel_fusion is off, so that TensorRT plans do the work between attentions, and this build has "
            "none; build again with --plans, or switch it on"
        )

    def over_plans(device: Device, model: ModelShape, weights: DeviceWeights, max_tokens: int) -> PlanProducts:
        head = KernelProducts(device, model, weights, max_tokens)
        return PlanProducts.load(device, model, weights, folder, index, max_tokens, head)

    return over_plans


def open_vision(manifest: Manifest) -> PlanVision | None:
    """The vision tower's plan on the GPU; None where the build has none.

    Raises:
        ArtifactError: no driver, no such GPU, or a plan that does not fit it.
        ConfigError: the GPU's memory does not suffice.
    """
    folder = manifest.folder(contract.VISION_ENCODER)
    index = open_plans(folder)
    if index is None:
        return None
    device = CudaDevice(KernelCache(kernel_folder() / "gpu"))
    try:
        return PlanVision(device, folder, index)
    except BaseException:
        device.close()
        raise


class _Progress:
    """Says every few seconds how many kernels are compiled: the first start takes a while."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        if done < total and time.monotonic() >= self._next:
            _log.info("compiling kernels for this GPU: %d of %d", done, total)
            self._next = time.monotonic() + PROGRESS_S


def open_device(kernels: Path, config: Config) -> CudaDevice:
    """The GPU that CUDA lists first, with the configuration's limits.

    Raises:
        ArtifactError: no driver or no GPU.
    """
    device = CudaDevice(KernelCache(kernels), use_graphs=config.enable_cuda_graph, num_streams=config.num_streams)
    device.memory_limit = int(min(config.gpu_memory_gb * 1e9, device.memory_limit * FREE_SHARE))
    return device


def gpu_options(config: Config, device: CudaDevice) -> GpuOptions:
    """What the configuration lets a decoder take."""
    return GpuOptions(
        num_slots=config.max_batch_size,
        max_context_length=config.max_context_length,
        memory_limit=device.memory_limit,
        prefill_chunk=config.prefill_chunk,
        block_tokens=config.kv_block_tokens,
    )
