"""Third stage: pixels → image embeddings, through the vision runtime, one call for all images of Triton's batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from python_backends import config, contract, manifest, triton_io
from python_backends.errors import ImagesNotSupportedError, InvalidImageError
from python_backends.manifest import ONNXRUNTIME
from python_backends.runtime.base import Float32, UInt8, VisionRuntime
from python_backends.tracing import Tracing

MODEL = contract.MODELS[contract.VISION_ENCODER]


def encode_together(runtime: VisionRuntime | None, batches: Sequence[UInt8]) -> list[Float32]:
    """Several requests' pixels, each [n, 3, H, W] uint8 → their embeddings [n, tokens per image, D] float32.

    Raises:
        ImagesNotSupportedError: ``runtime`` is None, as in a text-only model.
        InvalidImageError: pixels of another size than the model's.
    """
    if runtime is None:
        raise ImagesNotSupportedError("this model reads text only; leave the images out")
    pixels = batches[0] if len(batches) == 1 else np.concatenate(batches)
    if pixels.shape[1:] != runtime.image_shape:
        raise InvalidImageError(f"the pixels are {pixels.shape[1:]}; this model takes {runtime.image_shape}")
    features = runtime.encode(pixels)
    ends = np.cumsum([len(batch) for batch in batches])
    return np.split(features, ends[:-1])


def open_runtime(repository: Path) -> VisionRuntime | None:
    """The vision runtime of a built repository; None for a text-only model.

    Raises:
        ArtifactError, ConfigError: see `manifest.load`, `config.load`.
    """
    settings = config.load(repository)
    built = manifest.load(repository, [contract.VISION_ENCODER])
    if built.model.image is None:
        return None
    if built.runtime != ONNXRUNTIME:
        from python_backends.runtime.gpu.open import open_vision

        on_gpu = open_vision(built)
        if on_gpu is not None:
            return on_gpu
    from python_backends.runtime.onnxruntime import OnnxRuntimeVision

    folder = built.folder(contract.VISION_ENCODER)
    return OnnxRuntimeVision(
        folder,
        num_threads=settings.num_threads,
        cpu_kernels=settings.cpu_kernels,
        kernel_fusion=settings.enable_kernel_fusion,
    )


class TritonPythonModel:
    """The `vision_encoder` model; in a text-only repository it loads all the same and refuses images."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the vision encoder that the repository's manifest names.

        Raises:
            ArtifactError, ConfigError: with what to do; Triton shows it as the reason the model did not load.
        """
        settings = config.load(triton_io.repository(args))
        triton_io.start_logging(contract.VISION_ENCODER, settings)
        self._tracing = Tracing(contract.VISION_ENCODER, settings)
        self._runtime = open_runtime(triton_io.repository(args))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Encode all images of Triton's batch, whose pixels have one shape, and answer each request with its own."""
        spans = [
            self._tracing.begin(contract.VISION_ENCODER, triton_io.traceparent(request), wicore__batch=len(requests))
            for request in requests
        ]
        try:
            batches = [triton_io.rows(request, contract.VISION_PIXELS.name) for request in requests]
            found = encode_together(self._runtime, batches)
            return [triton_io.respond_rows({contract.IMAGE_FEATURES.name: rows}, MODEL) for rows in found]
        except Exception as error:
            for span in spans:
                span.fail(error)
            return [triton_io.refuse(error) for _ in requests]
        finally:
            for span in spans:
                span.end()

    def finalize(self) -> None:
        """Free the runtime."""
        if self._runtime:
            self._runtime.close()
        self._tracing.close()
