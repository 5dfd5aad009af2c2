"""The external-data file of one ONNX model, written front to back so that no weight is held longer than its chunk."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from builders.tensors import LazyTensor, row_chunks
from python_backends.errors import BuildError

PAGE = 4096
"""ONNX Runtime maps an initializer whose offset is a multiple of the page size, and copies it otherwise."""
_SMALL_ALIGNMENT = 64
_MAPPED_FROM = 64 * 1024  # below this, aligning to pages would waste more than a copy costs

_FLOAT16_MAX = float(np.finfo(np.float16).max)


class WeightFile:
    """Appends tensors to ``path`` and gives the TensorProto that refers to them by offset.

    A context manager: leaving it flushes the file to the disk. The ONNX model must lie in the same folder.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] | None = None) -> None:
        """Create the file. ``progress`` is told the bytes of every chunk written."""
        self.path = path
        self._progress = progress
        self._file = path.open("wb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Flush to the disk and close."""
        if not self._file.closed:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())

    def add(self, name: str, dtype: int, shape: Sequence[int], chunks: Iterable[NDArray[Any]]) -> onnx.TensorProto:
        """Append one tensor, given as consecutive pieces of its C-order elements.

        ``dtype`` is an ``onnx.TensorProto`` element type; the arrays must have the matching numpy dtype.

        Raises:
            BuildError: the pieces hold more or fewer elements than ``shape``.
            OSError: the disk is full, or the file cannot be written.
        """
        wanted = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype))
        length = math.prod(shape) * wanted.itemsize
        alignment = PAGE if length >= _MAPPED_FROM else _SMALL_ALIGNMENT
        offset = -(-self._file.tell() // alignment) * alignment
        self._file.write(bytes(offset - self._file.tell()))
        for chunk in chunks:
            if chunk.dtype != wanted:
                raise BuildError(f"{name}: got {chunk.dtype} for a tensor of {wanted}")
            self._file.write(np.ascontiguousarray(chunk).view(np.uint8).data)  # bfloat16 has no buffer of its own
            if self._progress is not None:
                self._progress(chunk.nbytes)
        written = self._file.tell() - offset
        if written != length:
            raise BuildError(f"{name}: {written} bytes written for shape {list(shape)}, which needs {length}")
        location = {"location": self.path.name, "offset": str(offset), "length": str(length)}
        return _external(name, dtype, shape, location)

    def add_array(self, name: str, array: NDArray[Any]) -> onnx.TensorProto:
        """Append a tensor that is already in memory."""
        return self.add(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, [array])

    def add_float(self, name: str, tensor: LazyTensor, dtype: int = onnx.TensorProto.FLOAT) -> onnx.TensorProto:
        """Append a tensor converted to ``dtype`` (FLOAT or FLOAT16), a few rows at a time.

        Raises:
            BuildError: a value beyond float16's range (±65504), which would become infinity.
        """
        chunks = (_convert(name, tensor.read(start, stop), dtype) for start, stop in row_chunks(tensor))
        return self.add(name, dtype, tensor.shape, chunks)

    def alias(self, name: str, tensor: onnx.TensorProto, shape: Sequence[int]) -> onnx.TensorProto:
        """The bytes of ``tensor`` under another name and shape (a tied head in the layout of another operator).

        Raises:
            BuildError: the shapes hold different numbers of elements.
        """
        if math.prod(shape) != math.prod(tensor.dims):
            raise BuildError(f"{name}: shape {list(shape)} does not hold the elements of {list(tensor.dims)}")
        location = {entry.key: entry.value for entry in tensor.external_data}
        return _external(name, tensor.data_type, shape, location)


def _external(name: str, dtype: int, shape: Sequence[int], location: dict[str, str]) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=dtype, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in location.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _convert(name: str, values: NDArray[np.float32], dtype: int) -> NDArray[Any]:
    if dtype == onnx.TensorProto.FLOAT:
        return values
    if dtype != onnx.TensorProto.FLOAT16:
        raise BuildError(f"{name}: cannot convert to {onnx.TensorProto.DataType.Name(dtype)}")
    largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
    if largest > _FLOAT16_MAX:
        raise BuildError(
            f"{name} holds {largest:g}, beyond float16's {_FLOAT16_MAX:g}; build with --precision fp32, int8 or int4"
        )
    return values.astype(np.float16)
