"""Tensors that stay on disk until a part of them is wanted.

Builders never hold a model: they read rows, convert them to float32, and write them on. Files are read with ``pread``
and never mapped, because pages of a mapped checkpoint count as the process's memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from python_backends.errors import BuildError

Float32 = NDArray[np.float32]

CHUNK_BYTES = 16 * 2**20
"""Float32 bytes read at a time: large enough for sequential disk speed, small enough not to count."""

_ITEM_SIZES = {"BF16": 2, "F16": 2, "F32": 4}
_MAX_HEADER = 100 * 2**20  # the limit of the safetensors format


class LazyTensor(Protocol):
    """A tensor read in slices of its first axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of all axes."""
        ...

    def read(self, start: int = 0, stop: int | None = None) -> Float32:
        """Rows ``start … stop − 1`` of axis 0 (all by default), as C-contiguous float32 that the caller owns.

        Raises:
            BuildError: the file cannot be read, or holds NaN or infinity there.
        """
        ...


@dataclass(frozen=True)
class FileTensor:
    """One tensor inside a safetensors file, in bfloat16, float16 or float32."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    on_read: Callable[[int], None] | None = None
    """Told the bytes of every read, for progress."""

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _ITEM_SIZES[self.dtype]

    def read(self, start: int = 0, stop: int | None = None) -> Float32:
        """See `LazyTensor.read`."""
        if not self.shape:
            raise BuildError(f"{self.name} in {self.path} is a scalar; a Gemma-3 checkpoint has none that are read")
        stop = self.shape[0] if stop is None else stop
        row = math.prod(self.shape[1:])
        raw = np.empty((stop - start) * row * _ITEM_SIZES[self.dtype], np.uint8)
        read_exactly(self.path, raw.data, self.offset + start * row * _ITEM_SIZES[self.dtype])
        values = _to_float32(raw, self.dtype).reshape(stop - start, *self.shape[1:])
        if not np.isfinite(values).all():
            raise BuildError(
                f"{self.name} in {self.path} holds NaN or infinity; the checkpoint is damaged: download it again"
            )
        if self.on_read is not None:
            self.on_read(raw.nbytes)
        return values


def _to_float32(raw: NDArray[np.uint8], dtype: str) -> Float32:
    if dtype == "BF16":
        wide = np.empty(raw.size // 2, np.uint32)
        np.left_shift(raw.view("<u2"), 16, out=wide, dtype=np.uint32)  # bfloat16 is float32's upper half
        return wide.view(np.float32)
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    return raw.view("<f4").astype(np.float32, copy=False)


def read_exactly(path: Path, buffer: memoryview, offset: int) -> None:
    """Fill ``buffer`` from byte ``offset`` of the file.

    Raises:
        BuildError: the file is gone, unreadable or shorter.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while buffer:
                count = os.preadv(file, [buffer], offset)
                if count == 0:
                    raise BuildError(f"{path} is truncated: it ends at byte {offset}; download it again")
                buffer, offset = buffer[count:], offset + count
        finally:
            os.close(file)
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from error


def read_header(path: Path) -> tuple[dict[str, Any], int, str]:
    """The JSON header of a safetensors file, the byte where data starts, and the header's sha256.

    Raises:
        BuildError: not a safetensors file, a Git LFS pointer, or a file shorter than its header says.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {error.strerror}; download the checkpoint again") from error
    prefix = bytearray(min(8, size))
    read_exactly(path, memoryview(prefix), 0)
    if bytes(prefix) == b"version ":
        raise BuildError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in {path.parent}")
    length = int.from_bytes(prefix, "little")
    if size < 8 or not 2 <= length <= _MAX_HEADER:
        raise BuildError(f"{path} is not a safetensors file; download it again")
    if size < 8 + length:
        raise BuildError(
            f"{path} is truncated: {size:,} bytes, its header alone needs {8 + length:,}; download it again"
        )
    raw = bytearray(length)
    read_exactly(path, memoryview(raw), 8)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise TypeError("not an object")  # noqa: TRY301 - one message for every malformed header
    except (ValueError, TypeError) as error:
        raise BuildError(f"{path} has a malformed safetensors header ({error}); download it again") from error
    header.pop("__metadata__", None)
    return header, 8 + length, hashlib.sha256(raw).hexdigest()


def read_tensors(path: Path, on_read: Callable[[int], None] | None = None) -> dict[str, FileTensor]:
    """Every tensor of a safetensors file by its name in the file; nothing but the header is read.

    Raises:
        BuildError: as `read_header`, an element type that is no float, or offsets that do not fit shapes or file.
    """
    header, start, _ = read_header(path)
    size = path.stat().st_size
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(extent) for extent in entry["shape"])
            first, last = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise BuildError(f"{path}: malformed entry for tensor {name!r}; download it again") from error
        if start + last > size:
            raise BuildError(
                f"{path} is truncated: {size:,} bytes, tensor {name!r} ends at {start + last:,}; download it again"
            )
        if dtype not in _ITEM_SIZES:
            raise BuildError(
                f"{path}: tensor {name!r} has element type {dtype}; WiCore reads BF16, F16 and F32: "
                "use the original checkpoint, not one that is already quantized"
            )
        tensor = FileTensor(path, name, dtype, shape, start + first, on_read)
        if first < 0 or tensor.num_bytes != last - first:
            raise BuildError(
                f"{path}: tensor {name!r} has {last - first} bytes, its shape {tensor.num_bytes}; download it again"
            )
        tensors[name] = tensor
    return tensors


@dataclass(frozen=True)
class _Concatenated:
    tensors: tuple[LazyTensor, ...]
    shape: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> Float32:
        stop = self.shape[0] if stop is None else stop
        parts, first = [], 0
        for tensor in self.tensors:
            low, high = max(start - first, 0), min(stop - first, tensor.shape[0])
            if low < high:
                parts.append(tensor.read(low, high))
            first += tensor.shape[0]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, *self.shape[1:]), np.float32)


def concat_rows(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """The tensors one below the other (packed q/k/v or gate/up projections); their other axes must agree.

    Raises:
        BuildError: they do not.
    """
    tails = {tensor.shape[1:] for tensor in tensors}
    if len(tails) != 1:
        raise BuildError(f"tensors of shapes {[tensor.shape for tensor in tensors]} cannot be joined by rows")
    return _Concatenated(tuple(tensors), (sum(tensor.shape[0] for tensor in tensors), *tails.pop()))


@dataclass(frozen=True)
class _Mapped:
    tensor: LazyTensor
    fn: Callable[[Float32], Float32]
    shape: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> Float32:
        rows = self.fn(self.tensor.read(start, stop))
        return np.ascontiguousarray(rows, np.float32).reshape(-1, *self.shape[1:])


def map_rows(
    tensor: LazyTensor, fn: Callable[[Float32], Float32], row_shape: tuple[int, ...] | None = None
) -> LazyTensor:
    """``fn`` applied to whatever rows are read, e.g. ``lambda w: w + 1`` for Gemma's norms.

    ``row_shape`` is the shape of one resulting row where it differs (a patch convolution flattened to a matrix).
    """
    return _Mapped(tensor, fn, (tensor.shape[0], *(tensor.shape[1:] if row_shape is None else row_shape)))


@dataclass(frozen=True)
class _Transposed:
    tensor: LazyTensor
    shape: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> Float32:
        return np.ascontiguousarray(self.tensor.read().T[start:stop])


def transpose(tensor: LazyTensor) -> LazyTensor:
    """[N, K] as [K, N]. Every read reads the whole tensor: for matrices of one layer, not for the embedding."""
    rows, columns = tensor.shape
    return _Transposed(tensor, (columns, rows))


def row_chunks(tensor: LazyTensor, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Row ranges (start, stop) that cover the tensor in pieces of about ``chunk_bytes`` of float32."""
    rows = max(1, chunk_bytes // max(1, 4 * math.prod(tensor.shape[1:])))
    for start in range(0, tensor.shape[0], rows):
        yield start, min(start + rows, tensor.shape[0])
