"""Launches on the CPU through Triton-lang's interpreter: slow, exact in meaning, for tests and debugging.

Needs PyTorch and Triton-lang. ``TRITON_INTERPRET`` must be set before Triton-lang is first imported, which
`InterpreterDevice` does unless somebody was faster.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from typing import Any

import numpy as np

from python_backends.errors import InternalError
from python_backends.runtime.gpu.launch import ALIGNMENT, DTYPES, Launch, Tensor

_KERNELS = "python_backends.runtime.gpu.kernels"


class InterpreterDevice:
    """A `Device` whose memory is the process's own and whose kernels are interpreted."""

    def __init__(self) -> None:
        os.environ["TRITON_INTERPRET"] = "1"
        self._memory: list[np.ndarray[Any, Any]] = []

    def allocate(self, dtype: str, *shape: int) -> Tensor:
        """See `Device.allocate`. Filled with a pattern that reads as NaN, so that nothing relies on zeros."""
        tensor = Tensor(0, dtype, shape)
        memory = np.full(tensor.num_bytes + ALIGNMENT, 0xFF, np.uint8)
        self._memory.append(memory)
        start: int = memory.ctypes.data
        return Tensor(start + -start % ALIGNMENT, dtype, shape)

    def launch(self, launch: Launch) -> None:
        """See `Device.launch`."""
        module, _, name = launch.kernel.rpartition(".")
        kernel = getattr(importlib.import_module(f"{_KERNELS}.{module}"), name)
        if type(kernel).__name__ != "InterpretedFunction":
            raise InternalError("Triton-lang was imported before TRITON_INTERPRET was set")
        args = [_argument(arg) for arg in launch.args]
        kernel[launch.grid](*args, **launch.constants)

    def write(self, tensor: Tensor, values: np.ndarray[Any, Any]) -> None:
        """See `Device.write`."""
        host_view(tensor)[...] = values.reshape(tensor.shape)

    def read(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        """See `Device.read`."""
        return host_view(tensor).copy()


def host_view(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The elements of a tensor that lies in this process's memory."""
    raw = (ctypes.c_uint8 * tensor.num_bytes).from_address(tensor.address)
    return np.frombuffer(raw, DTYPES[tensor.dtype]).reshape(tensor.shape)


def _argument(arg: Any) -> Any:
    """Tensors as PyTorch's, whose memory is the same; everything else as it is."""
    if not isinstance(arg, Tensor):
        return arg
    import torch

    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8e4nv": "float8_e4m3fn"}
    names |= {"i8": "int8", "u8": "uint8", "i32": "int32", "i64": "int64"}
    raw = (ctypes.c_uint8 * tensor_bytes(arg)).from_address(arg.address)
    return torch.frombuffer(raw, dtype=torch.uint8).view(getattr(torch, names[arg.dtype])).reshape(arg.shape)


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes, at least one: an empty tensor still has an address."""
    return max(tensor.num_bytes, DTYPES[tensor.dtype].itemsize)
