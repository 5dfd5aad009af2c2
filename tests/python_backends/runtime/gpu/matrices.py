"""Weights in every storage type, and what they mean."""

from __future__ import annotations

import numpy as np

from python_backends.runtime.gpu.device_weights import Matrix
from python_backends.runtime.gpu.interpreter import InterpreterDevice, host_view
from python_backends.runtime.gpu.weights import GROUP
from tests.python_backends.runtime.gpu.paged import Array, upload


def random_matrix(
    device: InterpreterDevice, storage: str, rows: int, columns: int, random: np.random.Generator
) -> Matrix:
    """A weight [rows, columns]; ``storage`` is an element type, u8 for four bits."""
    if storage in ("fp32", "bf16", "fp16"):
        return Matrix(upload(device, storage, random.standard_normal((rows, columns))), None, columns)
    if storage == "u8":
        data = upload(device, "u8", random.integers(0, 256, (rows, columns // 2)))
        scale = upload(device, "bf16", random.uniform(-0.2, 0.2, (rows, -(-columns // GROUP))))
        return Matrix(data, scale, columns)
    values = (
        random.integers(-127, 128, (rows, columns)) if storage == "i8" else random.uniform(-400, 400, (rows, columns))
    )
    scale = upload(device, "fp32", random.uniform(0.001, 0.01, rows))
    return Matrix(upload(device, storage, values), scale, columns)


def dequantized(matrix: Matrix) -> Array:
    """float64 [N, K]."""
    data = host_view(matrix.data)
    if matrix.scale is None:
        return data.astype(np.float64)
    scale = host_view(matrix.scale).astype(np.float64)
    if matrix.data.dtype == "u8":
        values = np.stack([data & 15, data >> 4], -1).reshape(len(data), -1).astype(np.float64) - 8
        return values * np.repeat(scale, GROUP, 1)[:, : matrix.columns]
    return data.astype(np.float64) * scale[:, None]
