"""Second stage: encoded pictures → uint8 pixels of the size the vision encoder takes. Nothing to do for text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from python_backends import config, contract, manifest, triton_io
from python_backends.errors import ImagesNotSupportedError
from python_backends.pixels import ImageLimits, ImageOptions, UInt8, allow_pixels, pixels_of, read_options

MODEL = contract.MODELS[contract.IMAGE_PROCESSOR]
MAX_THREADS = 4
"""Pictures decoded at once: each may hold several bytes for each of its pixels, so this bounds memory too."""
MAX_REQUESTS = 64
"""Requests with pictures that are worked on at once; their threads only wait for the decoders."""


class ImageProcessor:
    """Decodes pictures beside one another; Pillow lets go of the interpreter lock while it works.

    ``options`` is None for a text-only model.
    """

    def __init__(self, options: ImageOptions | None, limits: ImageLimits) -> None:
        self._options = options
        self._limits = limits
        allow_pixels(limits)
        self._decoders = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="wicore-decode")

    def __call__(self, encoded: Sequence[bytes]) -> UInt8:
        """Encoded pictures → [pictures and crops, 3, H, W] uint8 RGB, in order; thread-safe.

        Raises:
            InvalidImageError, ImageTooLargeError: see `pixels_of`.
            ImagesNotSupportedError: a picture for a text-only model.
        """
        options = self._options
        if not encoded:
            size = (options.height, options.width) if options else (0, 0)
            return np.empty((0, 3, *size), dtype=np.uint8)
        if options is None:
            raise ImagesNotSupportedError("this model reads text only; leave the images out")
        return np.concatenate(list(self._decoders.map(lambda data: pixels_of(data, options, self._limits), encoded)))

    def close(self) -> None:
        """End the threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)


def open_processor(repository: Path) -> ImageProcessor:
    """The image processor of a built repository, with the limits of its configuration.

    Raises:
        ArtifactError, ConfigError: see `manifest.load`, `config.load`, `read_options`.
    """
    settings = config.load(repository)
    built = manifest.load(repository, [contract.IMAGE_PROCESSOR])
    options = None
    if built.model.image:
        options = read_options(built.folder(contract.IMAGE_PROCESSOR), pan_and_scan=settings.pan_and_scan)
    return ImageProcessor(options, ImageLimits(settings.max_image_bytes, settings.max_image_pixels))


class TritonPythonModel:
    """The `image_processor` model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read how the repository's build wants its pictures.

        Raises:
            ArtifactError, ConfigError: with what to do; Triton shows it as the reason the model did not load.
        """
        triton_io.start_logging(contract.IMAGE_PROCESSOR)
        self._processor = open_processor(triton_io.repository(args))
        self._requests = ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="wicore-request")

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer prompts without images at once, the others from threads as their images become ready."""
        for request in requests:
            if triton_io.rows(request, contract.IMAGE_BYTES.name).size:
                self._requests.submit(triton_io.send_answer, request, MODEL, self._answer)
            else:
                triton_io.send_answer(request, MODEL, self._answer)

    def finalize(self) -> None:
        """End the threads."""
        self._requests.shutdown(wait=False, cancel_futures=True)
        self._processor.close()

    def _answer(self, request: Any) -> dict[str, triton_io.Value]:
        return {contract.PIXELS.name: self._processor(triton_io.text(request, contract.IMAGE_BYTES.name))}
