"""Memory on a device and launches on it, for kernels that are compiled ahead of time.

A `Launch` is plain data: which kernel, which grid, which arguments. The CUDA device runs its compiled form; the
interpreter device runs the same source on the CPU, so that whole steps are tested where there is no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from python_backends.runtime.base import Transfer

DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp8e4nv": np.dtype(ml_dtypes.float8_e4m3fn),
    "i8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
}
"""Element types by Triton-lang's names."""

ALIGNMENT = 256
"""Bytes that every allocation and every view handed to a kernel is aligned to, at least 16 of them."""


@dataclass(frozen=True)
class Tensor:
    """A C-contiguous piece of device memory. It does not own the memory; the device does."""

    address: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes."""
        return self.size * DTYPES[self.dtype].itemsize

    def view(self, offset: int, *shape: int) -> Tensor:
        """``shape`` elements from element ``offset`` on."""
        return Tensor(self.address + offset * DTYPES[self.dtype].itemsize, self.dtype, shape)

    def reshape(self, *shape: int) -> Tensor:
        """The same elements in another shape."""
        return Tensor(self.address, self.dtype, shape)


Argument = Tensor | int | float | None
"""Of a launch: a pointer, a 32-bit integer, a float, or None for a pointer that the kernel's constants leave unused."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch."""

    kernel: str
    """``module.function`` below `python_backends.runtime.gpu.kernels`."""
    grid: tuple[int, int, int]
    args: tuple[Argument, ...]
    """In the order of the function's parameters that are no constants."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Its ``tl.constexpr`` parameters."""
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Piece:
    """Equal runs of bytes in device memory, ``pitch`` apart, which leave it as one run after the other."""

    address: int
    width: int
    pitch: int
    height: int

    @property
    def num_bytes(self) -> int:
        """Bytes that move."""
        return self.width * self.height


Copy = tuple[Sequence[Piece], memoryview]
"""Pieces and the host memory that holds them one behind the other; it must stay until the copy is over."""


class Operation(Protocol):
    """Something else than a kernel that a device issues in order, a plan for instance."""

    def issue(self, stream: int) -> None:
        """Enqueue it on a stream, given as the driver's handle."""
        ...


class Recording(Protocol):
    """Launches that were recorded once and run again and again with the same arguments."""

    def replay(self) -> None:
        """Issue them all."""
        ...

    def close(self) -> None:
        """Forget them."""
        ...


class Device(Protocol):
    """Where launches run, in the order in which they are issued."""

    @property
    def capability(self) -> int:
        """Compute capability, 89 for 8.9; what kernels choose their sizes by."""
        ...

    @property
    def allocated_bytes(self) -> int:
        """Bytes allocated so far."""
        ...

    def activate(self) -> None:
        """Make the device the calling thread's."""
        ...

    def allocate(self, dtype: str, *shape: int) -> Tensor:
        """Uninitialised memory, `ALIGNMENT` aligned, kept until the device is closed.

        Raises:
            ConfigError: no such memory is left.
        """
        ...

    def record(self, steps: Sequence[Launch | Operation]) -> Recording:
        """Prepare steps to be issued many times."""
        ...

    def write(self, tensor: Tensor, values: NDArray[Any]) -> None:
        """Copy host values of the same size in bytes into device memory, in order; on return they may be reused."""
        ...

    def read(self, tensor: Tensor, into: NDArray[Any] | None = None) -> NDArray[Any]:
        """A host copy (in ``into`` where given), after everything issued before."""
        ...

    def fill_zero(self, tensor: Tensor) -> None:
        """Zero every byte."""
        ...

    def copy_out(self, copies: Sequence[Copy], after: Sequence[Transfer] = ()) -> Transfer:
        """Start to copy pieces to the host, after what was issued and ``after``, beside what will be issued."""
        ...

    def copy_in(self, copies: Sequence[Copy], after: Sequence[Transfer] = ()) -> Transfer:
        """Start to copy pieces from the host, the reverse of `copy_out`."""
        ...

    def wait_for(self, transfer: Transfer) -> None:
        """Let what is issued from now on run after a transfer."""
        ...

    def synchronize(self) -> None:
        """Wait for everything issued before, copies beside the steps included."""
        ...

    def close(self) -> None:
        """Free every allocation."""
        ...
