"""Triton's side of the decoder: requests in, streamed responses out, images encoded only when a request has some."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from python_backends import contract, manifest, triton_io
from python_backends.config import Config, load
from python_backends.decoder.engine import Engine
from python_backends.decoder.open import open_engine
from python_backends.decoder.sequence import Parameters, Piece, Request, parameters_within
from python_backends.errors import InternalError, InvalidParameterError, InvalidTextError, from_message
from python_backends.runtime.base import Float32

log = logging.getLogger("wicore")

MODEL = contract.MODELS[contract.DECODER]
ENCODE_THREADS = 16
"""Images, and requests with images, that wait for the vision encoder at once; these threads only wait."""


class TritonPythonModel:
    """The `decoder` model: decoupled, one request per call, never blocks Triton's thread."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the decoder that the repository's manifest names.

        Raises:
            ArtifactError, ConfigError: with what to do; Triton shows it as the reason the model did not load.
        """
        triton_io.start_logging(contract.DECODER)
        repository = triton_io.repository(args)
        self._config = load(repository)
        self._engine: Engine = open_engine(manifest.load(repository), self._config)
        # Two pools: a request waits in one for its images in the other, so neither can fill up with waits for itself.
        self._image_requests = ThreadPoolExecutor(ENCODE_THREADS, thread_name_prefix="wicore-images")
        self._encoders = ThreadPoolExecutor(ENCODE_THREADS, thread_name_prefix="wicore-encode")

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand each request to the engine, or to a thread that has its images encoded first."""
        for request in requests:
            answer = Answer(request)
            answer.guard(functools.partial(self._start, request, answer))

    def finalize(self) -> None:
        """End every request and free the runtime."""
        self._image_requests.shutdown(wait=False, cancel_futures=True)
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self._engine.close()

    def _start(self, request: Any, answer: Answer) -> None:
        triton_io.refuse_unimplemented(request, MODEL)
        if triton_io.text(request, "command"):
            self._command(request, answer)
            return
        ready = _read_request(request, self._config, answer)
        pixels = triton_io.array(request, "pixels")
        if pixels is None or not len(pixels):
            self._engine.submit(ready)
            return
        self._image_requests.submit(answer.guard, functools.partial(self._submit_with_images, ready, pixels))

    def _submit_with_images(self, request: Request, pixels: NDArray[np.uint8]) -> None:
        features = list(self._encoders.map(_encode, pixels))
        self._engine.submit(dataclasses.replace(request, image_features=np.concatenate(features)))

    def _command(self, request: Any, answer: Answer) -> None:
        command = _word(request, "command")
        if command != "stop":
            raise InvalidParameterError(f"unknown command {command!r}; this version knows 'stop'")
        found = self._engine.stop(_word(request, "request_id"))
        answer.send(Piece("", finish_reason="stop" if found else "not_found"))


class Answer:
    """Where the responses of one Triton request go; thread-safe as far as one request needs."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        stream = triton_io.array(request, "stream")
        self._streaming = stream is not None and bool(stream[0])
        self._held: list[Piece] = []

    def guard(self, work: Callable[[], None]) -> None:
        """Run, and turn an exception into this request's last response."""
        try:
            work()
        except Exception as error:
            self._sender.send(triton_io.refuse(error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        """Whether Triton knows that the caller has gone."""
        return bool(self._sender.is_cancelled())

    def send(self, piece: Piece) -> None:
        """Stream a piece, or hold it until the last one where the caller wants one response."""
        if not piece.finish_reason:
            if not self._streaming:
                self._held.append(piece)
            elif piece.text or piece.token_ids:
                self._sender.send(_response(piece))
            return
        if piece.error is not None and not (self._streaming or self._held or piece.token_ids):
            response = triton_io.refuse(piece.error)
        else:
            response = _response(_joined([*self._held, piece]))
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _joined(pieces: Sequence[Piece]) -> Piece:
    return dataclasses.replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(value for piece in pieces for value in piece.logprobs),
    )


def _response(piece: Piece) -> Any:
    usage = json.dumps(piece.usage.as_json()) if piece.usage else ""
    return triton_io.respond(
        {
            "text_output": [piece.text.encode()],
            "token_ids": np.asarray(piece.token_ids, np.int32),
            "index": np.zeros(1, np.int32),
            "finish_reason": [piece.finish_reason.encode()],
            "tool_calls": [b""],
            "usage": [usage.encode()],
            "token_logprobs": np.asarray(piece.logprobs, np.float32),
            "error_code": [piece.error.code.encode() if piece.error else b""],
        },
        MODEL,
    )


def _read_request(request: Any, config: Config, answer: Answer) -> Request:
    ids = triton_io.array(request, "input_ids")
    if ids is None:
        raise InvalidParameterError("the decoder needs input_ids (or a command); send prompts to the ensemble")
    starts = triton_io.array(request, "image_starts")
    return Request(
        input_ids=ids.tolist(),
        parameters=_read_parameters(request, config),
        sink=answer.send,
        image_starts=[] if starts is None else starts.tolist(),
        request_id=_word(request, "request_id"),
        is_cancelled=answer.is_cancelled,
    )


def _read_parameters(request: Any, config: Config) -> Parameters:
    scalars = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "ignore_eos", "echo")
    values: dict[str, object] = {name: _scalar(request, name) for name in scalars}
    values |= {name: _scalar(request, name) for name in ("queue_timeout_ms", "deadline_ms")}
    values["stop"] = tuple(_decoded("stop", stop) for stop in triton_io.text(request, "stop"))
    ids = triton_io.array(request, "stop_token_ids")
    values["stop_token_ids"] = () if ids is None else tuple(ids.tolist())
    return parameters_within(config, **values)


def _scalar(request: Any, name: str) -> Any:
    values = triton_io.array(request, name)
    return None if values is None else values.reshape(-1)[0].item()


def _word(request: Any, name: str) -> str:
    values = triton_io.text(request, name)
    return _decoded(name, values[0]) if values else ""


def _decoded(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidTextError(f"{name} is not valid UTF-8 at byte {error.start}") from error


def _encode(image: NDArray[np.uint8]) -> Float32:
    """Embeddings [tokens per image, D] of one image [3, H, W], through Triton so that its batcher and cache serve it.

    Raises:
        WiCoreError: whatever the vision encoder refused.
    """
    response = pb_utils.InferenceRequest(
        model_name=contract.VISION_ENCODER,
        requested_output_names=[contract.IMAGE_FEATURES.name],
        inputs=[pb_utils.Tensor(contract.VISION_PIXELS.name, image[np.newaxis])],
    ).exec()
    if response.has_error():
        text = response.error().message()
        raise from_message(text) or InternalError(f"the vision encoder failed: {text}")
    features: Float32 = pb_utils.get_output_tensor_by_name(response, contract.IMAGE_FEATURES.name).as_numpy()
    return features.reshape(-1, features.shape[-1])
