"""Calls of the CUDA driver API."""

from __future__ import annotations

from typing import Any

from cuda.bindings import driver as cu

from python_backends.errors import InternalError


def check(result: tuple[Any, ...]) -> Any:
    """The values of a driver call.

    Raises:
        InternalError: the driver's error.
    """
    error, *values = result
    if error != cu.CUresult.CUDA_SUCCESS:
        _, name = cu.cuGetErrorName(error)
        _, text = cu.cuGetErrorString(error)
        raise InternalError(f"{name.decode()}: {text.decode()}")
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)
