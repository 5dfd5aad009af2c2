"""From a built repository to a running engine, with or without Triton around it."""

from __future__ import annotations

from collections.abc import Callable

import onnxruntime
import psutil
from tokenizers import Tokenizer

from python_backends import contract
from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.errors import ArtifactError
from python_backends.kv.cache import KvCache
from python_backends.manifest import Manifest
from python_backends.runtime.base import KvLayout
from python_backends.runtime.onnxruntime import OnnxRuntimeDecoder

FREE_MEMORY_SHARE = 0.7
"""Of the memory that is free at start, what KV caches may grow to; the rest is for steps and the other stages."""


def open_engine(manifest: Manifest, config: Config, on_failure: Callable[[], None] = lambda: None) -> Engine:
    """Load the decoder that a manifest names and start its engine; see `Engine` for ``on_failure``.

    Raises:
        ArtifactError: a file is missing, corrupt or of another model.
        ConfigError: ``cpu_memory_gb`` is too small for a single short slot.
    """
    tokenizer = open_tokenizer(manifest)
    limit = _memory_limit(config)
    runtime = open_runtime(manifest, config)
    cache = _open_cache(runtime.kv_layout, manifest, config, int(limit * config.kv_cache_share))
    return Engine(runtime, tokenizer, config, cache=cache, on_failure=on_failure)


def _open_cache(layout: KvLayout, manifest: Manifest, config: Config, memory_limit: int) -> KvCache | None:
    if not config.enable_hmt:
        return None
    from python_backends.kv.open import open_cache

    return open_cache(layout, _fingerprint(manifest, config), config, memory_limit)


def open_runtime(manifest: Manifest, config: Config) -> OnnxRuntimeDecoder:
    """Load the decoder that a manifest names.

    Raises:
        ArtifactError, ConfigError: as `open_engine`.
    """
    slots = 1 - config.kv_cache_share if config.enable_hmt else 1.0
    return OnnxRuntimeDecoder(
        manifest.folder(contract.DECODER),
        manifest.model,
        num_slots=config.max_batch_size,
        max_context_length=config.max_context_length,
        memory_limit=int(_memory_limit(config) * slots),
        block_tokens=config.kv_block_tokens,
        num_threads=config.num_threads,
        cpu_kernels=config.cpu_kernels,
        kernel_fusion=config.enable_kernel_fusion,
    )


def _memory_limit(config: Config) -> float:
    """Bytes for KV, in slots and kept, together."""
    return min(config.cpu_memory_gb * 1e9, float(psutil.virtual_memory().available) * FREE_MEMORY_SHARE)


def _fingerprint(manifest: Manifest, config: Config) -> str:
    """What KV depends on beside its layout: the build, and the kernels that run it."""
    kernels = f"onnxruntime-{onnxruntime.__version__}/{config.cpu_kernels}/{config.enable_kernel_fusion}"
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
