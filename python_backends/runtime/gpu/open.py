"""From a built repository to a decoder on the GPU."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from python_backends import contract
from python_backends.config import Config
from python_backends.manifest import Manifest
from python_backends.runtime.gpu.compile import KernelCache
from python_backends.runtime.gpu.cuda import CudaDevice
from python_backends.runtime.gpu.decoder import GpuDecoder, GpuOptions
from python_backends.runtime.gpu.device_weights import load_weights
from python_backends.runtime.gpu.weights import open_weights

KERNEL_FOLDER = "kernels"
FREE_SHARE = 0.92
"""Of the GPU memory that is free at start, what the decoder may take; CUDA and other stages need some beside it."""
FEWEST_CHUNK_TOKENS = 2048
"""Prompt tokens of a step: with fewer the matrix units wait for weights."""

_log = logging.getLogger(__name__)


def open_decoder(manifest: Manifest, config: Config) -> GpuDecoder:
    """Load the decoder that a manifest names onto the GPU.

    Raises:
        ArtifactError: no driver, no such GPU, or a file that is missing or of another version.
        ConfigError: the GPU's memory does not suffice.
    """
    began = time.monotonic()
    folder = manifest.folder(contract.DECODER)
    index = open_weights(folder)
    device = open_device(folder / KERNEL_FOLDER, config)
    try:
        weights = load_weights(device, index)
        decoder = GpuDecoder(device, manifest.model, weights, gpu_options(config, device))
    except BaseException:
        device.close()
        raise
    _log.info("decoder: %s, loaded in %.1f s", device.name, time.monotonic() - began)
    return decoder


def open_device(kernels: Path, config: Config) -> CudaDevice:
    """The GPU that CUDA lists first, with the configuration's limits.

    Raises:
        ArtifactError: no driver or no GPU.
    """
    device = CudaDevice(KernelCache(kernels), use_graphs=config.enable_cuda_graph)
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
