"""From a built repository to a running engine, with or without Triton around it."""

from __future__ import annotations

import psutil
from tokenizers import Tokenizer

from python_backends import contract
from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.errors import ArtifactError
from python_backends.manifest import Manifest
from python_backends.runtime.onnxruntime import OnnxRuntimeDecoder

FREE_MEMORY_SHARE = 0.7
"""Of the memory that is free at start, what KV caches may grow to; the rest is for steps and the other stages."""


def open_engine(manifest: Manifest, config: Config) -> Engine:
    """Load the decoder that a manifest names and start its engine.

    Raises:
        ArtifactError: a file is missing, corrupt or of another model.
        ConfigError: ``cpu_memory_gb`` is too small for a single short slot.
    """
    tokenizer = open_tokenizer(manifest)
    return Engine(open_runtime(manifest, config), tokenizer, config)


def open_runtime(manifest: Manifest, config: Config) -> OnnxRuntimeDecoder:
    """Load the decoder that a manifest names.

    Raises:
        ArtifactError, ConfigError: as `open_engine`.
    """
    return OnnxRuntimeDecoder(
        manifest.folder(contract.DECODER),
        manifest.model,
        num_slots=config.max_batch_size,
        max_context_length=config.max_context_length,
        memory_limit=int(min(config.cpu_memory_gb * 1e9, psutil.virtual_memory().available * FREE_MEMORY_SHARE)),
        num_threads=config.num_threads,
        cpu_kernels=config.cpu_kernels,
    )


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
