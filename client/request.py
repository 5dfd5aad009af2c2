"""What the user asks, as a Triton request. Names, types and dims come from the contract."""

from __future__ import annotations

import difflib
import io
import json
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from python_backends import contract, tracing
from python_backends.errors import (
    EmptyPromptError,
    InvalidImageError,
    InvalidMessagesError,
    InvalidParameterError,
    InvalidTextError,
)

ImageLike = str | os.PathLike[str] | bytes | Image.Image
"""A picture: a file's path, encoded bytes (PNG, JPEG, WebP …), or a Pillow image."""
Messages = Sequence[Mapping[str, Any]]
"""The OpenAI list: ``{"role", "content"}``, content a string or parts such as ``{"type": "image"}``."""


class Options(TypedDict, total=False):
    """How the answer is drawn and when it ends; what is left out takes the server's default."""

    max_tokens: int
    min_tokens: int
    temperature: float
    """0 is greedy."""
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    """Above 1 makes tokens of the prompt and the answer less likely to come again; 1 is off."""
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    """Token id → what is added to its logit, −100 … 100."""
    n: int
    """Answers to the one prompt."""
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    echo: bool
    """Give the prompt's text out first."""
    logprobs: int
    """Most likely tokens to report beside each drawn one."""
    prompt_logprobs: int
    """Report the prompt's tokens as well, with so many of the most likely ones beside each."""
    response_format: Mapping[str, Any]
    """``{"type": "json_schema", "json_schema": {"schema": …}}``, json_object, regex, choice or grammar."""
    tools: Sequence[Mapping[str, Any]]
    """OpenAI's list of functions that the model may call."""
    tool_choice: str | Mapping[str, Any]
    """none, auto, required, or OpenAI's object that names a function."""
    priority: int
    """Lower is served sooner."""
    queue_timeout_ms: int
    deadline_ms: int
    session: str
    """Name under which the KV cache finds what this request leaves, to be pinned, prefetched or erased."""
    cache_salt: str
    """Requests share what the KV cache holds with those of the same salt only."""
    traceparent: str
    """The trace (W3C Trace Context) that the server's spans are to join, where it keeps traces."""
    wicore_line: str
    """A line that is open to the decoder (`python_backends.decoder.lines`); the request ends with it."""


_JSON = ("messages", "tools", "tool_choice", "response_format", "logit_bias")
"""Inputs that hold JSON."""

_PARAMETERS = (tracing.PARAMETER, contract.LINE)
"""Options that are no inputs: an ensemble hands a request's parameters to every stage."""

_NUMPY: dict[contract.TritonType, Any] = {
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_UINT64": np.uint64,
    "TYPE_UINT8": np.uint8,
    "TYPE_FP32": np.float32,
    "TYPE_BOOL": np.bool_,
}


def generate_request(
    prompt: str | None,
    messages: Messages | None,
    images: Sequence[ImageLike],
    request_id: str,
    options: Mapping[str, Any],
) -> service_pb2.ModelInferRequest:
    """A request to the ensemble.

    Raises:
        InvalidRequestError: and its subclasses, for what can be seen to be wrong without the server.
    """
    if (prompt is None) == (messages is None):
        raise EmptyPromptError("give either a prompt or messages")
    values: dict[str, Any] = {"stream": True, "request_id": request_id, **options, "messages": messages}
    if prompt is not None:
        values["text_input"] = prompt
    if images:
        values["image"] = [encoded(image) for image in images]
    if options.get("logit_bias") is not None:
        values["logit_bias"] = _biases(options["logit_bias"])
    values |= {name: _json(name, values[name]) for name in _JSON if values.get(name) is not None}
    parameters = {name: value for name in _PARAMETERS if (value := values.pop(name, None))}
    request = infer_request(contract.MODELS[contract.ENSEMBLE], values, request_id)
    for name, value in parameters.items():
        request.parameters[name].string_param = value
    return request


def stop_request(request_id: str) -> service_pb2.ModelInferRequest:
    """A request to the decoder that ends another one."""
    model = contract.MODELS[contract.DECODER]
    return infer_request(model, {"request_id": request_id, "command": "stop"}, f"{request_id}-stop")


def infer_request(model: contract.Model, values: Mapping[str, Any], request_id: str) -> service_pb2.ModelInferRequest:
    """Any request to a model of the contract: every tensor with the batch dimension 1; None values are left out.

    Raises:
        InvalidParameterError: a name that the model does not have, or a value that its type cannot hold.
        InvalidTextError: text that is not Unicode.
    """
    request = service_pb2.ModelInferRequest(model_name=model.name, id=request_id)
    for name, value in values.items():
        if value is None:
            continue
        tensor = _tensor(model, name)
        array = _array(tensor, value)
        datatype = "BYTES" if tensor.dtype == "TYPE_STRING" else tensor.dtype.removeprefix("TYPE_")
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        raw = serialize_byte_tensor(array).item() if datatype == "BYTES" and array.size else array.tobytes()
        request.raw_input_contents.append(raw)
    return request


def encoded(image: ImageLike) -> bytes:
    """The picture as a file's bytes; a Pillow image becomes a PNG, which loses nothing.

    Raises:
        InvalidImageError: the file cannot be read.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise InvalidImageError(f"cannot read the image {os.fspath(image)}: {error.strerror}") from error


def _tensor(model: contract.Model, name: str) -> contract.Tensor:
    for tensor in model.inputs:
        if tensor.name == name:
            return tensor
    near = difflib.get_close_matches(name, [tensor.name for tensor in model.inputs], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InvalidParameterError(f"there is no option {name!r}{hint}")


def _array(tensor: contract.Tensor, value: Any) -> NDArray[Any]:
    """[1, n] for a list, [1, 1] for a scalar."""
    items = [value] if tensor.dims == (1,) or isinstance(value, str | bytes | int | float) else list(value)
    if tensor.dtype == "TYPE_STRING":
        filled = np.empty((1, len(items)), dtype=np.object_)
        filled[0, :] = [_text(tensor.name, item) for item in items]
        return filled
    try:
        array = np.array([items])
        converted = array.astype(_NUMPY[tensor.dtype])
        kept = np.array_equal(converted, array) or tensor.dtype == "TYPE_FP32"
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidParameterError(f"{tensor.name} cannot be {value!r}: {error}") from error
    if not kept:
        raise InvalidParameterError(f"{tensor.name} cannot be {value!r}: it does not fit {tensor.dtype[5:].lower()}")
    return converted


def _biases(value: Any) -> dict[str, float]:
    try:
        return {str(_token_id(token)): float(bias) for token, bias in dict(value).items()}
    except (TypeError, ValueError) as error:
        raise InvalidParameterError(f"logit_bias must have numbers by token ids: {error}") from error


def _token_id(key: Any) -> int:
    return int(key) if isinstance(key, str) else operator.index(key)


def _json(name: str, value: Any) -> str:
    try:
        # Any sequence and mapping, as the options say; json knows lists and dictionaries.
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        kind = InvalidMessagesError if name == "messages" else InvalidParameterError
        raise kind(f"{name} cannot be written as JSON: {error}") from error


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _text(name: str, value: str | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise InvalidTextError(f"{name} holds half of a surrogate pair at {error.start}; it is not text") from error
