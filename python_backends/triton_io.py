"""Triton's side of every stage: tensors in and out by the contract, and exceptions mapped once.

This file and `decoder.backend` import ``triton_python_backend_utils``, which exists inside a Python-backend stub alone.
"""

from __future__ import annotations

import difflib
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from python_backends import logs, tracing
from python_backends.config import Config
from python_backends.contract import LINE, Model, Tensor, TritonType
from python_backends.errors import InternalError, InvalidParameterError, InvalidTextError, WiCoreError

log = logging.getLogger("wicore")

NUMPY: dict[TritonType, Any] = {
    "TYPE_STRING": np.object_,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_UINT64": np.uint64,
    "TYPE_FP32": np.float32,
    "TYPE_BOOL": np.bool_,
    "TYPE_UINT8": np.uint8,
}

Value = NDArray[Any] | Sequence[bytes]

TRITON_PARAMETERS = (
    "triton_",
    "sequence_",
    "binary_data",
    "priority",
    "timeout",
    "classification",
    "headers",
    tracing.PARAMETER,
    LINE,
)
"""Beginnings of the request parameters that Triton and its clients use themselves, and our own."""


def start_logging(stage: str, settings: Config) -> None:
    """Send the stage's log to the server's standard error, where Triton's own lines go."""
    logs.start(stage, settings.log_format)


def traceparent(request: Any) -> str:
    """The request's trace (`tracing`); empty where it has none."""
    return _parameter(request, tracing.PARAMETER)


def line(request: Any) -> str:
    """The line that the request ends with (`decoder.lines`); empty where it names none."""
    return _parameter(request, LINE)


def _parameter(request: Any, name: str) -> str:
    return str(json.loads(request.parameters() or "{}").get(name, ""))


def repository(args: Mapping[str, str]) -> Path:
    """The model repository's root, from what Triton gives a stage's ``initialize``."""
    return Path(args["model_repository"]).parent


def array(request: Any, name: str) -> NDArray[Any] | None:
    """An input without its batch dimension; None where the request left it out.

    Raises:
        InvalidParameterError: the request holds more than one prompt.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values: NDArray[Any] = tensor.as_numpy()
    if values.shape[0] != 1:
        raise InvalidParameterError(f"{name} has a batch of {values.shape[0]}; send one prompt per request")
    row: NDArray[Any] = values[0]
    return row


def rows(request: Any, name: str) -> NDArray[Any]:
    """A required input with its batch dimension, for a model whose rows are items of their own."""
    values: NDArray[Any] = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
    return values


def text(request: Any, name: str) -> list[bytes]:
    """A BYTES input as a list; empty where the request left it out."""
    values = array(request, name)
    return [] if values is None else [bytes(value) for value in values.reshape(-1)]


def strings(request: Any, name: str) -> list[str]:
    """As `text`, decoded.

    Raises:
        InvalidTextError: not UTF-8.
    """
    try:
        return [value.decode() for value in text(request, name)]
    except UnicodeDecodeError as error:
        raise InvalidTextError(f"{name} is not valid UTF-8 at byte {error.start}") from error


def refuse_parameters(request: Any, names: Sequence[str]) -> None:
    """Refuse what is no input: over HTTP, Triton makes a parameter of every field that it does not know.

    Raises:
        InvalidParameterError: with the nearest of ``names``.
    """
    for name in json.loads(request.parameters() or "{}"):
        if name.startswith(TRITON_PARAMETERS):
            continue
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"inputs are {', '.join(names)}"
        raise InvalidParameterError(f"there is no input {name!r}; {hint}")


def respond(values: Mapping[str, Value], model: Model) -> Any:
    """A response that holds exactly the model's outputs, each with the batch dimension in front.

    Raises:
        KeyError: the stage left an output of the contract out.
    """
    tensors = [_tensor(output, values[output.name]) for output in model.outputs]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _tensor(output: Tensor, value: Value) -> Any:
    if output.dtype == "TYPE_STRING":
        filled = np.empty((1, len(value)), dtype=np.object_)
        filled[0, :] = list(value)
    else:
        filled = np.ascontiguousarray(value, dtype=NUMPY[output.dtype])[np.newaxis]
    return pb_utils.Tensor(output.name, filled)


class Responder:
    """Makes responses as `respond` does, from values of which most are empty: those tensors are made only once.

    A tensor lies in memory shared with Triton from its first sending on. Send with `sending` held: two threads that
    send a tensor for the first time would both put it there.
    """

    def __init__(self, model: Model) -> None:
        self.sending = threading.Lock()
        self._model = model
        self._empty = {
            output.name: _tensor(output, [b""] if output.dtype == "TYPE_STRING" else np.empty(0))
            for output in model.outputs
        }

    def __call__(self, values: Mapping[str, Value | None]) -> Any:
        """``None`` for an empty string or an empty array; every output must be named."""
        tensors = []
        for output in self._model.outputs:
            value = values[output.name]
            tensors.append(self._empty[output.name] if value is None else _tensor(output, value))
        return pb_utils.InferenceResponse(output_tensors=tensors)


def respond_rows(values: Mapping[str, NDArray[Any]], model: Model) -> Any:
    """As `respond`, for arrays that have their batch dimension already."""
    tensors = [
        pb_utils.Tensor(output.name, np.ascontiguousarray(values[output.name], dtype=NUMPY[output.dtype]))
        for output in model.outputs
    ]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def refuse(error: BaseException) -> Any:
    """The error response for an exception: its own text if it is in the tree, else a plain one and a log entry."""
    if not isinstance(error, WiCoreError):
        log.error("unexpected failure", exc_info=error)
        error = InternalError("the server failed on this request; its log has the details")
    code = getattr(pb_utils.TritonError, error.triton_code, pb_utils.TritonError.INTERNAL)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))


def answer_each(requests: Sequence[Any], model: Model, fn: Callable[[Any], Mapping[str, Value]]) -> list[Any]:
    """One response per request, in order; a request that fails does not touch the others of its batch."""
    responses = []
    for request in requests:
        try:
            responses.append(respond(fn(request), model))
        except Exception as error:
            responses.append(refuse(error))
    return responses


def send_answer(request: Any, model: Model, fn: Callable[[Any], Mapping[str, Value]]) -> None:
    """As `answer_each`, for one request, from any thread and whenever it is ready.

    The model's ``execute`` then returns None. It need not be decoupled for that (tritonserver 2.51), and within an
    ensemble it must not be: no step may take inputs of different decoupled models, nor of one and the client's.
    """
    response = answer_each([request], model, fn)[0]
    request.get_response_sender().send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
