"""Launches on the CPU through Triton-lang's interpreter: slow, exact in meaning, for tests and debugging.

Needs PyTorch and Triton-lang. ``TRITON_INTERPRET`` must be set before Triton-lang is first imported, which
`InterpreterDevice` does unless somebody was faster.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from python_backends.errors import InternalError
from python_backends.runtime.gpu.launch import ALIGNMENT, DTYPES, Launch, Operation, Piece, Tensor

_KERNELS = "python_backends.runtime.gpu.kernels"


class InterpreterDevice:
    """A `Device` whose memory is the process's own and whose kernels are interpreted."""

    def __init__(self, capability: int = 90) -> None:
        os.environ["TRITON_INTERPRET"] = "1"
        self._capability = capability
        self._memory: list[NDArray[Any]] = []
        self.allocated_bytes = 0

    @property
    def capability(self) -> int:
        """See `Device.capability`."""
        return self._capability

    def activate(self) -> None:
        """See `Device.activate`: threads share this one."""

    def allocate(self, dtype: str, *shape: int) -> Tensor:
        """See `Device.allocate`. Filled with a pattern that reads as NaN, so that nothing relies on zeros."""
        tensor = Tensor(0, dtype, shape)
        memory = np.full(tensor.num_bytes + ALIGNMENT, 0xFF, np.uint8)
        self._memory.append(memory)
        self.allocated_bytes += tensor.num_bytes
        start: int = memory.ctypes.data
        return Tensor(start + -start % ALIGNMENT, dtype, shape)

    def launch(self, launch: Launch) -> None:
        """Run one kernel."""
        module, _, name = launch.kernel.rpartition(".")
        kernel = getattr(importlib.import_module(f"{_KERNELS}.{module}"), name)
        if type(kernel).__name__ != "InterpretedFunction":
            raise InternalError("Triton-lang was imported before TRITON_INTERPRET was set")
        args = [_argument(arg) for arg in launch.args]
        with warnings.catch_warnings(), np.errstate(over="ignore"):  # what is too large is infinite, as on a GPU
            # Loop bounds read on the device: the interpreter converts them in a way that NumPy will refuse one day.
            warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
            kernel[launch.grid](*args, **launch.constants)

    def record(self, steps: Sequence[Launch | Operation]) -> Replay:
        """See `Device.record`."""
        return Replay(self, tuple(steps))

    def write(self, tensor: Tensor, values: NDArray[Any]) -> None:
        """See `Device.write`."""
        host_view(tensor)[...] = values.reshape(tensor.shape)

    def read(self, tensor: Tensor, into: NDArray[Any] | None = None) -> NDArray[Any]:
        """See `Device.read`."""
        if into is None:
            return host_view(tensor).copy()
        into[...] = host_view(tensor).reshape(into.shape)
        return into

    def fill_zero(self, tensor: Tensor) -> None:
        """See `Device.fill_zero`."""
        ctypes.memset(tensor.address, 0, tensor.num_bytes)

    def copy_out(self, piece: Piece, into: memoryview) -> None:
        """See `Device.copy_out`."""
        np.frombuffer(into, np.uint8).reshape(piece.height, piece.width)[...] = _runs(piece)

    def copy_in(self, piece: Piece, payload: memoryview) -> None:
        """See `Device.copy_in`."""
        _runs(piece)[...] = np.frombuffer(payload, np.uint8).reshape(piece.height, piece.width)

    def synchronize(self) -> None:
        """See `Device.synchronize`: nothing is ever pending."""

    def close(self) -> None:
        """See `Device.close`."""
        self._memory.clear()


@dataclass(frozen=True)
class Replay:
    """`Recording` of an `InterpreterDevice`."""

    device: InterpreterDevice
    steps: tuple[Launch | Operation, ...]

    def replay(self) -> None:
        """See `Recording.replay`."""
        for step in self.steps:
            if isinstance(step, Launch):
                self.device.launch(step)
            else:
                step.issue(0)

    def close(self) -> None:
        """See `Recording.close`."""


def host_view(tensor: Tensor) -> NDArray[Any]:
    """The elements of a tensor that lies in this process's memory."""
    raw = (ctypes.c_uint8 * tensor.num_bytes).from_address(tensor.address)
    found: NDArray[Any] = np.frombuffer(memoryview(raw), DTYPES[tensor.dtype]).reshape(tensor.shape)
    return found


def _runs(piece: Piece) -> NDArray[np.uint8]:
    """The runs [height, width] of a piece, as they lie."""
    length = piece.pitch * (piece.height - 1) + piece.width
    flat = np.frombuffer(memoryview((ctypes.c_uint8 * length).from_address(piece.address)), np.uint8)
    return np.lib.stride_tricks.as_strided(flat, (piece.height, piece.width), (piece.pitch, 1))


def _argument(arg: Any) -> Any:
    """Tensors as PyTorch's, whose memory is the same; everything else as it is."""
    if not isinstance(arg, Tensor):
        return arg
    import torch

    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8e4nv": "float8_e4m3fn"}
    names |= {"i8": "int8", "u8": "uint8", "i32": "int32", "i64": "int64"}
    raw = (ctypes.c_uint8 * max(arg.num_bytes, 1)).from_address(arg.address)
    return torch.frombuffer(raw, dtype=torch.uint8).view(getattr(torch, names[arg.dtype])).reshape(arg.shape)
