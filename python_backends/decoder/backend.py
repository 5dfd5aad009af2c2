"""Triton's side of the decoder: requests in, streamed responses out, images encoded only when a request has some."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from python_backends import contract, manifest, tracing, triton_io
from python_backends.config import Config, load
from python_backends.decoder.engine import Engine
from python_backends.decoder.formats import FormatReader
from python_backends.decoder.lines import Lines
from python_backends.decoder.metrics import MetricsReporter
from python_backends.decoder.open import open_engine, open_tokenizer
from python_backends.decoder.parameters import Parameters, parameters_within, read_logit_bias
from python_backends.decoder.sequence import Piece, Request
from python_backends.decoder.trace import AnswerTrace
from python_backends.errors import (
    CancelledError,
    DeadlineExceededError,
    ImageCountError,
    InternalError,
    InvalidParameterError,
    OverloadedError,
    UnsupportedFeatureError,
    from_message,
)
from python_backends.kv.identity import content_hash
from python_backends.runtime.base import Float32
from python_backends.tracing import Tracing

log = logging.getLogger("wicore")

MODEL = contract.MODELS[contract.DECODER]
SCALARS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "n",
    "ignore_eos",
    "echo",
    "logprobs",
    "prompt_logprobs",
    "priority",
    "queue_timeout_ms",
    "deadline_ms",
)
"""Inputs that are parameters of the same name."""
SESSION_COMMAND = "session."
"""In front of what to do with the KV of a session (`kv.session_commands`)."""
INPUTS = [tensor.name for tensor in contract.MODELS[contract.ENSEMBLE].inputs]
LONGEST_NAME = 1024
"""Characters of a session's name or a salt."""
ENCODE_THREADS = 16
"""Images that wait for the vision encoder at once, and requests that wait for images; these threads only wait."""


class TritonPythonModel:
    """The `decoder` model: decoupled, one request per call, never blocks Triton's thread."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the decoder that the repository's manifest names.

        Raises:
            ArtifactError, ConfigError: with what to do; Triton shows it as the reason the model did not load.
        """
        repository = triton_io.repository(args)
        self._config = load(repository)
        triton_io.start_logging(contract.DECODER, self._config)
        self._tracing = Tracing(contract.DECODER, self._config)
        built = manifest.load(repository, [contract.DECODER, contract.TOKENIZER])
        self._engine: Engine = open_engine(built, self._config, on_failure=_end_process)
        self._formats = FormatReader(open_tokenizer(built), built.model)
        self._metrics = self._report_metrics()
        self._lines = Lines()
        # Two pools: a request waits in one for its images in the other, so neither can fill up with waits for itself.
        self._preparing = ThreadPoolExecutor(ENCODE_THREADS, thread_name_prefix="wicore-prepare")
        self._room = threading.BoundedSemaphore(self._config.max_batch_size + self._config.max_queue)
        self._encoders = ThreadPoolExecutor(ENCODE_THREADS, thread_name_prefix="wicore-encode")

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand each request to the engine, or to a thread that has its images encoded first."""
        for request in requests:
            answer = Answer(request)
            answer.guard(functools.partial(self._start, request, answer))

    def finalize(self) -> None:
        """End every request and free the runtime."""
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self._encoders.shutdown(wait=False, cancel_futures=True)
        if self._metrics is not None:
            self._metrics.close()
        self._lines.close()
        self._engine.close()
        self._tracing.close()

    def _report_metrics(self) -> MetricsReporter | None:
        """None without a KV cache, or where Triton offers no metrics."""
        cache = self._engine.cache
        family = getattr(pb_utils, "MetricFamily", None)
        if cache is None or family is None:
            return None
        try:
            return MetricsReporter(family, cache.stats)
        except pb_utils.TritonModelException as error:
            log.warning("no metrics of the KV cache: %s", error)
            return None

    def _start(self, request: Any, answer: Answer) -> None:
        triton_io.refuse_parameters(request, INPUTS)
        if triton_io.text(request, "command"):
            self._command(request, answer)
            return
        ready = self._read_request(request, answer)
        answer.expect(ready.parameters.n)
        pixels = triton_io.array(request, "pixels")
        has_images = pixels is not None and len(pixels) > 0
        sent = {name: _word(request, name) for name in ("response_format", "tools", "tool_choice")}
        if not has_images and not any(sent.values()):
            self._engine.submit(ready)
            return
        if not self._room.acquire(blocking=False):
            raise OverloadedError("as many requests as may wait are being prepared already; try again later")
        work = functools.partial(self._prepare, ready, sent, pixels if has_images else None)
        self._preparing.submit(answer.guard, work).add_done_callback(lambda _: self._room.release())

    def _prepare(self, request: Request, sent: Mapping[str, str], pixels: NDArray[np.uint8] | None) -> None:
        """What takes longer than a hand-over: compile the answer's grammar, have the images encoded."""
        _check_wanted(request)
        request = self._formats.apply(request, **sent)
        if pixels is not None:
            request = self._with_images(request, pixels)
        self._engine.submit(request)

    def _with_images(self, request: Request, pixels: NDArray[np.uint8]) -> Request:
        """The request with the embeddings of those images whose KV is not cached."""
        if len(pixels) != len(request.image_starts):
            raise ImageCountError(f"the prompt has places for {len(request.image_starts)} images, not {len(pixels)}")
        if self._engine.cache is not None:
            request = dataclasses.replace(request, image_hashes=[content_hash(image.tobytes()) for image in pixels])
        hit = self._engine.look_up(request)
        known = 0 if hit is None else sum(start < hit.length for start in request.image_starts)
        try:
            features = self._encoded(pixels[known:], request.traceparent)
            _check_wanted(request)
        except BaseException:
            if hit is not None:
                hit.release()
            raise
        rest = functools.partial(self._encoded, pixels[:known], request.traceparent)
        return dataclasses.replace(request, hit=hit, image_features=features, encoded_from=known, encode_rest=rest)

    def _encoded(self, pixels: NDArray[np.uint8], traceparent: str) -> Float32 | None:
        """[images × tokens per image, D] of pixels [images, 3, H, W]; None for none."""
        features = list(self._encoders.map(_encode, pixels, itertools.repeat(traceparent)))
        return np.concatenate(features) if features else None

    def _read_request(self, request: Any, answer: Answer) -> Request:
        ids = triton_io.array(request, "input_ids")
        if ids is None:
            raise InvalidParameterError("the decoder needs input_ids (or a command); send prompts to the ensemble")
        starts = triton_io.array(request, "image_starts")
        for name in ("session", "cache_salt"):
            if len(_word(request, name)) > LONGEST_NAME:
                raise InvalidParameterError(f"{name} has at most {LONGEST_NAME} characters")
        if _word(request, "session") and self._engine.cache is None:
            raise UnsupportedFeatureError("session is not offered without the KV cache; set enable_hmt in wicore.json")
        arrived_s, parent = time.monotonic(), triton_io.traceparent(request)
        sink = AnswerTrace(self._tracing, parent, arrived_s, answer.send) if parent else answer.send
        return Request(
            input_ids=ids.tolist(),
            parameters=_read_parameters(request, self._config),
            sink=sink,
            image_starts=[] if starts is None else starts.tolist(),
            cache_salt=_word(request, "cache_salt"),
            session=_word(request, "session"),
            request_id=_word(request, "request_id"),
            traceparent=parent,
            arrived_s=arrived_s,
            is_cancelled=self._lines.watched(triton_io.line(request)) or answer.is_cancelled,
        )

    def _command(self, request: Any, answer: Answer) -> None:
        command = _word(request, "command")
        if command == "stats":
            answer.send(Piece(json.dumps(self._engine.snapshot()), finish_reason="stop"))
            return
        if command.startswith(SESSION_COMMAND):
            work = functools.partial(self._session, request, command, answer)
            self._preparing.submit(answer.guard, work)  # it may wait for disks
            return
        if command not in ("stop", "line"):
            raise InvalidParameterError(f"unknown command {command!r}; there are stop, stats, line and session.…")
        request_id = _word(request, "request_id")
        if not request_id:
            raise InvalidParameterError(f"{command} needs a request_id: the one to be stopped, or the line's name")
        if command == "line":
            self._open_line(request, request_id, answer)
            return
        found = self._engine.stop(request_id)
        answer.send(Piece("", finish_reason="stop" if found else "not_found"))

    def _open_line(self, request: Any, name: str, answer: Answer) -> None:
        if triton_io.array(request, "input_ids") is not None:
            raise InvalidParameterError("a line is a call to the decoder itself: behind an ensemble nobody is missed")
        gone = Piece("", finish_reason="cancelled")
        self._lines.open(name, answer.is_cancelled, functools.partial(answer.send, gone))
        answer.send(Piece("open"))

    def _session(self, request: Any, command: str, answer: Answer) -> None:
        cache = self._engine.cache
        if cache is None:
            raise UnsupportedFeatureError("sessions need the KV cache; set enable_hmt in wicore.json")
        action = command.removeprefix(SESSION_COMMAND)
        found = cache.session(action, _word(request, "session"), _word(request, "cache_salt"))
        answer.send(Piece(json.dumps(found), finish_reason="stop"))


class Answer:
    """Where the responses of one Triton request go: its ``n`` answers, in one stream."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        stream = triton_io.array(request, "stream")
        self._streaming = stream is not None and bool(stream[0])
        self._held: list[Piece] = []
        self._open = 1
        self._sent = False
        # Triton (2.51) frees a request with its last response: asking about it afterwards ends the server.
        self._lock = threading.Lock()
        self._over = False

    def expect(self, count: int) -> None:
        """So many answers will come.

        Raises:
            InvalidParameterError: several, for a caller who wants a single response.
        """
        if count > 1 and not self._streaming:
            raise InvalidParameterError("n above 1 needs stream: true, since every answer has responses of its own")
        self._open = count

    def guard(self, work: Callable[[], None]) -> None:
        """Run, and turn an exception into this request's last response."""
        try:
            work()
        except Exception as error:
            self._respond(triton_io.refuse(error), last=True)

    def is_cancelled(self) -> bool:
        """Whether Triton knows that the caller has gone; False once the answer is complete."""
        with self._lock:
            return not self._over and bool(self._sender.is_cancelled())

    def send(self, piece: Piece) -> None:
        """Stream a piece, or hold it until the last one where the caller wants one response."""
        if not piece.finish_reason:
            if not self._streaming:
                self._held.append(piece)
            elif piece.text or piece.token_ids or piece.tool_calls:
                self._respond(_response(piece), last=False)
            return
        self._open -= 1
        nothing_yet = not (self._held or self._sent or piece.token_ids)
        if piece.error is not None and nothing_yet and not self._open:
            self._respond(triton_io.refuse(piece.error), last=True)
        else:
            self._respond(_response(_joined([*self._held, piece])), last=not self._open)

    def _respond(self, response: Any, *, last: bool) -> None:
        with self._lock, _responder().sending:
            self._sent = True
            self._over = last
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)


def _joined(pieces: Sequence[Piece]) -> Piece:
    prompts = [piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs is not None]
    return dataclasses.replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(value for piece in pieces for value in piece.logprobs),
        top_logprobs=tuple(top for piece in pieces for top in piece.top_logprobs),
        tool_calls=tuple(call for piece in pieces for call in piece.tool_calls),
        prompt_logprobs=prompts[0] if prompts else None,
    )


@functools.cache
def _responder() -> triton_io.Responder:
    """One for all answers, made when the first is written: Triton's module is not whole while this one is imported."""
    return triton_io.Responder(MODEL)


def _response(piece: Piece) -> Any:
    calls = [call.as_json() for call in piece.tool_calls]
    prompt = dataclasses.asdict(piece.prompt_logprobs) if piece.prompt_logprobs else None
    return _responder()(
        {
            "text_output": _bytes(piece.text),
            "token_ids": np.asarray(piece.token_ids, np.int32) if piece.token_ids else None,
            "index": np.full(1, piece.index, np.int32),
            "finish_reason": _bytes(piece.finish_reason),
            "tool_calls": _json(calls),
            "usage": _json(piece.usage.as_json() if piece.usage else None),
            "token_logprobs": np.asarray(piece.logprobs, np.float32) if piece.logprobs else None,
            "top_logprobs": _json(piece.top_logprobs),
            "prompt_token_logprobs": _json(prompt),
            "error_code": _bytes(piece.error.code if piece.error else ""),
        }
    )


def _bytes(text: str) -> list[bytes] | None:
    return [text.encode()] if text else None


def _json(value: object) -> list[bytes] | None:
    """JSON, or nothing for nothing."""
    return _bytes(json.dumps(value, ensure_ascii=False)) if value else None


def _read_parameters(request: Any, config: Config) -> Parameters:
    values: dict[str, object] = {name: _scalar(request, name) for name in SCALARS}
    values["logit_bias"] = read_logit_bias(_word(request, "logit_bias"))
    values["stop"] = tuple(triton_io.strings(request, "stop"))
    ids = triton_io.array(request, "stop_token_ids")
    values["stop_token_ids"] = () if ids is None else tuple(ids.tolist())
    return parameters_within(config, **values)


def _scalar(request: Any, name: str) -> Any:
    values = triton_io.array(request, name)
    return None if values is None else values.reshape(-1)[0].item()


def _word(request: Any, name: str) -> str:
    return next(iter(triton_io.strings(request, name)), "")


def _check_wanted(request: Request) -> None:
    """Before and after work that takes a while.

    Raises:
        CancelledError, DeadlineExceededError: nobody waits for the answer any more.
    """
    assert request.arrived_s is not None
    if request.is_cancelled():
        raise CancelledError("the request was stopped")
    if time.monotonic() >= request.arrived_s + request.parameters.deadline_ms / 1000:
        raise DeadlineExceededError("the request's deadline passed while its images were encoded")


def _end_process() -> None:
    """Nothing in here can be trusted any more, and Triton would go on saying that it is ready.

    What was sent has left by then: sending waits for Triton to take it.
    """
    os._exit(1)


def _encode(image: NDArray[np.uint8], traceparent: str) -> Float32:
    """Embeddings [tokens per image, D] of one image [3, H, W], through Triton so that its batcher and cache serve it.

    Raises:
        WiCoreError: whatever the vision encoder refused.
    """
    response = pb_utils.InferenceRequest(
        model_name=contract.VISION_ENCODER,
        requested_output_names=[contract.IMAGE_FEATURES.name],
        inputs=[pb_utils.Tensor(contract.VISION_PIXELS.name, image[np.newaxis])],
        parameters={tracing.PARAMETER: traceparent} if traceparent else {},
    ).exec()
    if response.has_error():
        text = response.error().message()
        raise from_message(text) or InternalError(f"the vision encoder failed: {text}")
    features: Float32 = pb_utils.get_output_tensor_by_name(response, contract.IMAGE_FEATURES.name).as_numpy()
    return features.reshape(-1, features.shape[-1])
