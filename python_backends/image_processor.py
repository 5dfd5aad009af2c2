"""Second stage: encoded pictures → uint8 pixels of the size the vision encoder takes. Nothing to do for text."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from python_backends import config, contract, triton_io
from python_backends.errors import OverloadedError
from python_backends.pixels import open_processor
from python_backends.tracing import Tracing

MODEL = contract.MODELS[contract.IMAGE_PROCESSOR]
MAX_REQUESTS = 64
"""Requests with pictures that are worked on at once; their threads only wait for the decoders."""


class TritonPythonModel:
    """The `image_processor` model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read how the repository's build wants its pictures.

        Raises:
            ArtifactError, ConfigError: with what to do; Triton shows it as the reason the model did not load.
        """
        settings = config.load(triton_io.repository(args))
        triton_io.start_logging(contract.IMAGE_PROCESSOR, settings)
        self._tracing = Tracing(contract.IMAGE_PROCESSOR, settings)
        self._processor = open_processor(triton_io.repository(args))
        self._room = threading.BoundedSemaphore(settings.max_queue + settings.max_batch_size)
        self._requests = ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="wicore-request")

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer prompts without images at once, the others from threads as their images become ready."""
        for request in requests:
            if triton_io.rows(request, contract.IMAGE_BYTES.name).size:
                self._queue(request)
            else:
                triton_io.send_answer(request, MODEL, self._answer)

    def finalize(self) -> None:
        """End the threads."""
        self._requests.shutdown(wait=False, cancel_futures=True)
        self._processor.close()
        self._tracing.close()

    def _queue(self, request: Any) -> None:
        """As many as the decoder lets wait; one more would only wait here for being refused there."""
        if self._room.acquire(blocking=False):
            done = self._requests.submit(triton_io.send_answer, request, MODEL, self._answer)
            done.add_done_callback(lambda _: self._room.release())
        else:
            triton_io.send_answer(request, MODEL, _refuse)

    def _answer(self, request: Any) -> dict[str, triton_io.Value]:
        images = triton_io.text(request, contract.IMAGE_BYTES.name)
        parent = triton_io.traceparent(request) if images else ""  # nothing to tell of a prompt without any
        with self._tracing.span(contract.IMAGE_PROCESSOR, parent, wicore__images=len(images)):
            return {contract.PIXELS.name: self._processor(images)}


def _refuse(_: Any) -> dict[str, triton_io.Value]:
    raise OverloadedError("as many pictures as may wait are waiting already; try again later")
