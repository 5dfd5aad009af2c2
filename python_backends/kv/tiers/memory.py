"""The memory behind an arena: plain pages, or host memory that a GPU can read and copy from at full speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from python_backends.errors import ConfigError
from python_backends.runtime.memory import lazy_zeros


@dataclass(frozen=True)
class Memory:
    """A buffer and how it is given back."""

    array: NDArray[np.uint8]
    """[num_bytes], aligned to a page."""
    release: Callable[[], None]
    """The array may not be touched any more afterwards."""
    device_address: int | None = None
    """Where a GPU sees the same bytes; None where none does."""


def plain_memory(num_bytes: int) -> Memory:
    """Pages of which only touched ones cost memory."""
    return Memory(lazy_zeros((num_bytes,), np.uint8), lambda: None)


def pinned_memory(num_bytes: int) -> Memory:
    """Page-locked host memory, mapped into the address space of every GPU, all of it resident at once.

    Raises ConfigError where there is no CUDA, or no memory that may be locked.
    """
    import ctypes

    try:
        from cuda.bindings import runtime as cuda
    except ImportError as error:
        raise ConfigError("pinned memory needs CUDA; install wicore[cuda], or leave kv tiers unpinned") from error

    def call(result: tuple[Any, ...], what: str) -> Any:
        if int(result[0]):
            raise ConfigError(f"{num_bytes / 1e9:.3g} GB of host memory could not be {what} for the GPU ({result[0]})")
        return result[1] if len(result) > 1 else None

    flags = cuda.cudaHostAllocPortable | cuda.cudaHostAllocMapped
    address = int(call(cuda.cudaHostAlloc(num_bytes, flags), "locked"))
    device = int(call(cuda.cudaHostGetDevicePointer(address, 0), "mapped"))
    array = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def release() -> None:
        call(cuda.cudaFreeHost(address), "unlocked")

    return Memory(array, release, device)
