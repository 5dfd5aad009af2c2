"""A strict stand-in for ``triton_python_backend_utils``, which exists inside a Triton stub alone.

It knows what the stages use and nothing else: another attribute, or an input that the model's contract does not name,
is an error.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from python_backends.contract import Model

FINAL = 1


class Tensor:
    def __init__(self, name: str, values: NDArray[Any]) -> None:
        assert isinstance(values, np.ndarray)
        self.name = name
        self._values = values

    def as_numpy(self) -> NDArray[Any]:
        return self._values


class TritonError:
    UNKNOWN: ClassVar[int] = 0
    INTERNAL: ClassVar[int] = 1
    NOT_FOUND: ClassVar[int] = 2
    INVALID_ARG: ClassVar[int] = 3
    UNAVAILABLE: ClassVar[int] = 4
    UNSUPPORTED: ClassVar[int] = 5
    ALREADY_EXISTS: ClassVar[int] = 6
    CANCELLED: ClassVar[int] = 7

    def __init__(self, message: str, code: int) -> None:
        self.message = message
        self.code = code


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self.tensors = {tensor.name: tensor.as_numpy() for tensor in output_tensors}
        self.error = error


class Request:
    """One request to ``model``; lists of bytes become BYTES tensors with the batch dimension in front."""

    def __init__(self, model: Model, inputs: Mapping[str, Sequence[bytes] | NDArray[Any]]) -> None:
        self._known = {tensor.name for tensor in model.inputs}
        assert set(inputs) <= self._known
        self._tensors = {name: Tensor(name, _array(values)) for name, values in inputs.items()}
        self._answered = threading.Event()
        self._response: InferenceResponse | None = None

    def input(self, name: str) -> Tensor | None:
        assert name in self._known, f"{name} is not an input of the model"
        return self._tensors.get(name)

    def parameters(self) -> str:
        """As JSON; empty for none, as Triton gives it."""
        return ""

    def get_response_sender(self) -> Request:
        return self

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        assert self._response is None, "a model that is not decoupled sends one response"
        assert flags == FINAL
        self._response = response
        self._answered.set()

    @property
    def answered(self) -> bool:
        return self._answered.is_set()

    def response(self) -> InferenceResponse:
        assert self._answered.wait(30), "no response"
        assert self._response is not None
        return self._response


def _array(values: Sequence[bytes] | NDArray[Any]) -> NDArray[Any]:
    if isinstance(values, np.ndarray):
        return values
    filled = np.empty((1, len(values)), dtype=np.object_)
    filled[0, :] = list(values)
    return filled


def install() -> None:
    """Make the stand-in importable, unless the test runs inside a real stub."""
    module = types.ModuleType("triton_python_backend_utils")
    vars(module).update(
        Tensor=Tensor,
        TritonError=TritonError,
        InferenceResponse=InferenceResponse,
        get_input_tensor_by_name=Request.input,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
    )
    sys.modules.setdefault(module.__name__, module)
