"""From a built repository to a running engine, with or without Triton around it."""

from __future__ import annotations

from collections.abc import Callable

import psutil
from tokenizers import Tokenizer

from python_backends import contract
from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.errors import ArtifactError
from python_backends.kv.cache import KvCache
from python_backends.manifest import ONNXRUNTIME, Manifest
from python_backends.runtime.base import DecoderRuntime, KvLayout

FREE_MEMORY_SHARE = 0.7
"""Of the memory that is free at start, what KV caches may grow to; the rest is for steps and the other stages."""


def open_engine(manifest: Manifest, config: Config, on_failure: Callable[[], None] = lambda: None) -> Engine:
    """Load the decoder that a manifest names and start its engine; see `Engine` for ``on_failure``.

    Raises:
        ArtifactError: a file is missing, corrupt or of another model, or the build is for a GPU that is not there.
        ConfigError: ``cpu_memory_gb`` or ``gpu_memory_gb`` is too small for a single short slot.
    """
    tokenizer = open_tokenizer(manifest)
    runtime = open_runtime(manifest, config)
    cache = _open_cache(runtime.kv_layout, manifest, config)
    return Engine(runtime, tokenizer, config, cache=cache, on_failure=on_failure)


def open_runtime(manifest: Manifest, config: Config) -> DecoderRuntime:
    """Load the decoder that a manifest names, onto the GPU where it was built for one.

    Raises:
        ArtifactError, ConfigError: as `open_engine`.
    """
    if manifest.runtime != ONNXRUNTIME:
        return _open_gpu(manifest, config)
    from python_backends.runtime.onnxruntime import OnnxRuntimeDecoder

    return OnnxRuntimeDecoder(
        manifest.folder(contract.DECODER),
        manifest.model,
        num_slots=config.max_batch_size,
        max_context_length=config.max_context_length,
        memory_limit=int(_memory_limit(config) * (1 - config.kv_cache_share if config.enable_hmt else 1.0)),
        block_tokens=config.kv_block_tokens,
        num_threads=config.num_threads,
        cpu_kernels=config.cpu_kernels,
        kernel_fusion=config.enable_kernel_fusion,
    )


def _open_gpu(manifest: Manifest, config: Config) -> DecoderRuntime:
    try:
        from python_backends.runtime.gpu.open import open_decoder
    except ImportError as error:
        raise ArtifactError(
            f"{manifest.repository} was built for GPUs ({manifest.runtime}) and {error.name} is not installed here; "
            f"run `pip install 'wicore[{manifest.runtime}]'`, or build with --runtime {ONNXRUNTIME}"
        ) from error
    return open_decoder(manifest, config)


def _open_cache(layout: KvLayout, manifest: Manifest, config: Config) -> KvCache | None:
    """The tiers beside the slots. Slots on a GPU take none of the host's memory, and then no tier lies on the GPU."""
    if not config.enable_hmt:
        return None
    from python_backends.kv.open import open_cache
    from python_backends.kv.tiers.memory import pinned_memory

    fingerprint, limit = _fingerprint(manifest, config), _memory_limit(config)
    if manifest.runtime != ONNXRUNTIME:
        return open_cache(layout, fingerprint, config, int(limit), device_share=0.0, allocate=pinned_memory)
    return open_cache(layout, fingerprint, config, int(limit * config.kv_cache_share))


def _memory_limit(config: Config) -> float:
    """Bytes for KV, in slots and kept, together."""
    return min(config.cpu_memory_gb * 1e9, float(psutil.virtual_memory().available) * FREE_MEMORY_SHARE)


def _fingerprint(manifest: Manifest, config: Config) -> str:
    """What KV depends on beside its layout: the build, and the kernels that run it."""
    if manifest.runtime == ONNXRUNTIME:
        import onnxruntime

        kernels = f"onnxruntime-{onnxruntime.__version__}/{config.cpu_kernels}/{config.enable_kernel_fusion}"
    else:
        from python_backends.runtime.gpu.compile import sources_hash

        kernels = f"{manifest.runtime}-{sources_hash()}/{config.enable_kernel_fusion}"
    return f"{manifest.fingerprint}/{manifest.source}/{kernels}"


def open_tokenizer(manifest: Manifest) -> Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
        ArtifactError: it cannot be read.
    """
    path = manifest.folder(contract.TOKENIZER) / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ArtifactError(f"{path} is not a tokenizer ({error}); rebuild with `wicore build --force`") from error
