"""Weight-only block quantization in the layout of ONNX Runtime's MatMulNBits and GatherBlockQuantized.

A weight [N, K] is cut along K into blocks that share one scale (and, asymmetric, one zero point):
``w ≈ (q − zero_point) · scale`` with unsigned q of 4 or 8 bits. Both operators read the same bytes, so a tied embedding
and head are stored once.

Scales minimise the squared error instead of covering the largest weight: for a few scales the block is rounded, the
least-squares scale of that rounding is taken, and the best is kept. A symmetric scale carries a sign, so that the
largest weight lands on −2^(bits−1), the longer side of the range. docs/building.md has what this gains.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, TypeVar, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from builders.tensors import Float32, LazyTensor, row_chunks
from builders.weights import WeightFile
from python_backends.errors import BuildError

UInt8 = NDArray[np.uint8]
Result = TypeVar("Result")

PrecisionName = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]
PRECISIONS: tuple[PrecisionName, ...] = get_args(PrecisionName)

FLOATS: dict[str, int] = {
    "fp32": onnx.TensorProto.FLOAT,
    "bf16": onnx.TensorProto.BFLOAT16,
    "fp16": onnx.TensorProto.FLOAT16,
}
"""Element types of ONNX Runtime's weights that are not quantized."""

DEFAULT_BLOCKS = {"int4": 128, "int8": 32}
"""Block sizes that `wicore build` takes unless told otherwise. In int4 the attention projections have eight bits, and
with those blocks of 128 are finer than llama.cpp's Q4_0 at fewer bytes; docs/performance.md has the comparison.
"""

PER_CHANNEL = 0
"""As a block size: one scale per output channel."""

_MIN_BLOCK, _MAX_CHANNEL_BLOCK = 16, 256
_TILE = 2**17  # elements worked on at once: their float32 copies stay in a core's second-level cache
_WIDE_BLOCK = 1024  # from here on reductions along the contiguous axis beat a transposed tile
_TINY = np.float32(1e-30)  # a block below this is stored as zeros; its reciprocal would overflow

# Trial scales as multiples of 1 / (largest weight); above 1 the largest weights are clipped to spare the others.
_TRIALS = {4: (0.9, 1.0, 1.1, 1.2, 1.35, 1.5), 8: (1.0,)}
_CHANNEL_TRIALS = {4: (1.0, 1.15, 1.35, 1.6, 1.9, 2.3, 2.8, 3.5), 8: (1.0, 1.2)}


@dataclass(frozen=True)
class Precision:
    """How weights are stored.

    Raises:
        BuildError: an unknown name, or a block size that the operators do not take.
    """

    name: PrecisionName
    block: int = 32
    """Weights that share a scale: a power of two from 16 on, or `PER_CHANNEL`. Unused by floating types."""
    symmetric: bool = True
    """Without zero points, which cost half a byte (int4) or a byte (int8) per block."""

    def __post_init__(self) -> None:
        if self.name not in PRECISIONS:
            raise BuildError(f"precision {self.name!r} is unknown; choose one of {', '.join(PRECISIONS)}")
        if self.block != PER_CHANNEL and (self.block < _MIN_BLOCK or self.block & (self.block - 1)):
            raise BuildError(
                f"block size {self.block} is not a power of two from {_MIN_BLOCK} on; "
                f"use 32, 64 or 128, or {PER_CHANNEL} for one scale per channel"
            )

    @classmethod
    def of(cls, name: PrecisionName, block: int | None = None, symmetric: bool = True) -> Self:
        """A precision, with its own default block size where none is given."""
        return cls(name, DEFAULT_BLOCKS.get(name, 32) if block is None else block, symmetric)

    @property
    def bits(self) -> int:
        """Bits of one weight."""
        return {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}[self.name]

    @property
    def quantized(self) -> bool:
        """Whether weights are stored as blocks of integers."""
        return self.name in {"int8", "int4"}

    def block_size(self, columns: int) -> int:
        """The operators' ``block_size`` attribute for a weight with K = ``columns``.

        One scale per channel is stored as equal scales of large blocks: the operators want blocks of a power of two,
        and one such block over all of K would pad 2560 columns to 4096.
        """
        if self.block != PER_CHANNEL:
            return self.block
        return max(32, min(columns & -columns, _MAX_CHANNEL_BLOCK))


class Quantized(NamedTuple):
    """Rows of a quantized weight [N, K]."""

    data: UInt8
    """[N, ceil(K / block), block · bits / 8]; of two 4-bit values the first has the lower half of the byte."""
    scales: Float32
    """[N, ceil(K / block)]"""
    zero_points: UInt8 | None
    """[N, ceil(blocks · bits / 8)] packed as ``data``; None is 2^(bits−1) throughout."""


class Packed(NamedTuple):
    """The initializers of one weight; of fp32, bf16 and fp16 only ``data``. The operators' ``block_size`` is
    ``precision.block_size(K)``, which differs from ``precision.block`` for one scale per channel.
    """

    data: onnx.TensorProto
    """Quantized: uint8 [N, K/block, block·bits/8]; else float [N, K]."""
    scales: onnx.TensorProto | None
    """float32 [N, K/block]"""
    zero_points: onnx.TensorProto | None
    """uint8 [N, ceil(K/block · bits / 8)]"""


def pack_linear(weight: LazyTensor, precision: Precision, file: WeightFile, name: str) -> Packed:
    """Stream a weight [N, K] into the file; initializers ``name``, ``name_scales`` and ``name_zero_points``.

    For GatherBlockQuantized, alias ``data`` as [N, K/block · block·bits/8]; scales and zero points fit as they are, and
    the gathered rows have K rounded up to whole blocks.

    Raises:
        BuildError: NaN or infinity in the weight, or a value beyond float16's range in fp16.
    """
    if not precision.quantized:
        return Packed(file.add_float(name, weight, FLOATS[precision.name]), None, None)
    rows, columns = weight.shape
    block = precision.block_size(columns)
    blocks = -(-columns // block)
    scales = np.empty((rows, blocks), np.float32)
    zeros = None if precision.symmetric else np.empty((rows, -(-blocks * precision.bits // 8)), np.uint8)

    def pieces() -> Iterator[UInt8]:
        start = 0
        for piece in map_chunks(weight, lambda values: quantize(values, precision)):
            stop = start + len(piece.scales)
            scales[start:stop] = piece.scales
            if zeros is not None and piece.zero_points is not None:
                zeros[start:stop] = piece.zero_points
            start = stop
            yield piece.data

    data = file.add(name, onnx.TensorProto.UINT8, (rows, blocks, block * precision.bits // 8), pieces())
    return Packed(
        data,
        file.add_array(f"{name}_scales", scales),
        None if zeros is None else file.add_array(f"{name}_zero_points", zeros),
    )


def map_chunks(weight: LazyTensor, work: Callable[[Float32], Result]) -> Iterator[Result]:
    """``work`` on consecutive rows of a weight, in order, on every core with a bounded number of pieces in flight."""
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        pending: list[Future[Result]] = []
        try:
            for start, stop in row_chunks(weight):
                pending.append(pool.submit(lambda start=start, stop=stop: work(weight.read(start, stop))))  # type: ignore[misc]
                if len(pending) > workers:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()


def quantize(weight: Float32, precision: Precision) -> Quantized:
    """Quantize rows [N, K] to int8 or int4; see `Quantized` for the layout. The input is not changed."""
    rows, columns = weight.shape
    block = precision.block_size(columns)
    blocks = -(-columns // block)
    if columns % block:
        weight = np.pad(weight, ((0, 0), (0, blocks * block - columns)))
    per_channel = precision.block == PER_CHANNEL
    width = blocks * block if per_channel else block
    units = weight.reshape(-1, width)  # a unit is what shares one scale
    values = np.empty(units.shape, np.uint8)
    scales = np.empty(len(units), np.float32)
    zeros = np.empty(len(units), np.uint8)
    step = max(1, _TILE // width)
    for start in range(0, len(units), step):
        stop = min(start + step, len(units))
        if width < _WIDE_BLOCK:
            # Transposed, so that sums over a short block are whole-vector additions.
            tile, scale, zero = _quantize_units(np.ascontiguousarray(units[start:stop].T), precision, axis=0)
            values[start:stop] = tile.T
        else:
            tile, scale, zero = _quantize_units(units[start:stop], precision, axis=1)
            values[start:stop] = tile
        scales[start:stop], zeros[start:stop] = scale.ravel(), zero.ravel()
    data = _pack_bits(values.reshape(rows, -1), precision.bits).reshape(rows, blocks, -1)
    repeat = blocks if per_channel else 1
    scales = np.repeat(scales, repeat).reshape(rows, blocks)
    if precision.symmetric:
        return Quantized(data, scales, None)
    return Quantized(data, scales, _pack_bits(np.repeat(zeros, repeat).reshape(rows, blocks), precision.bits))


def _quantize_units(x: Float32, precision: Precision, axis: int) -> tuple[UInt8, Float32, UInt8]:
    """Quantize units lying along ``axis``; returns unsigned values, and scale and zero point per unit (axis kept)."""
    levels = 2**precision.bits - 1
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    if precision.symmetric:
        # The reference is the negated extreme weight: divided by it, that weight is −1, the longer side of the range.
        reference = -np.where(high > -low, high, low)
        steps = (levels + 1) / 2
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        reference = high - low
        steps = float(levels)
    dead = np.abs(reference) < _TINY
    inverse = np.where(dead, 0, 1 / np.where(dead, 1, reference)).astype(np.float32)
    y = x * inverse
    q, scratch = np.empty_like(y), np.empty_like(y)
    best_gain = np.full(reference.shape, -1, np.float32)
    best_scale = np.zeros_like(best_gain)
    if precision.symmetric:
        zero = np.full_like(best_gain, (levels + 1) // 2)
    else:
        zero = np.rint(-low * inverse * np.float32(levels))
    trials = (_CHANNEL_TRIALS if precision.block == PER_CHANNEL else _TRIALS)[precision.bits]
    for trial in trials:
        _round(y, np.float32(steps * trial), zero, levels, q)
        wq = np.multiply(q, y, out=scratch).sum(axis, keepdims=True)
        qq = np.multiply(q, q, out=scratch).sum(axis, keepdims=True)
        fit = wq / np.maximum(qq, 1)  # the scale with the least squared error for these integers
        gain = wq * fit  # what that error is smaller than the sum of squares by
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(best_scale, fit, where=better)
    dead |= best_scale <= 0
    _round(y, np.where(dead, 0, 1 / np.where(dead, 1, best_scale)).astype(np.float32), zero, levels, q)
    q += zero
    return q.astype(np.uint8), best_scale * reference, zero.astype(np.uint8)


def _round(y: Float32, inverse_scale: Float32 | np.float32, zero: Float32, levels: int, out: Float32) -> None:
    """out = y · inverse_scale rounded and clipped to what ``levels`` above ``−zero`` can express."""
    np.multiply(y, inverse_scale, out=out)
    np.rint(out, out=out)
    np.maximum(out, -zero, out=out)
    np.minimum(out, levels - zero, out=out)


def _pack_bits(values: UInt8, bits: int) -> UInt8:
    """Two 4-bit values a byte along the last axis, the first in the lower half; 8-bit values as they are."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    return np.bitwise_or(values[:, 0::2], np.left_shift(values[:, 1::2], 4), dtype=np.uint8)


def unpack_bits(packed: UInt8, bits: int, count: int) -> UInt8:
    """[N, bytes] → [N, count] values, the inverse of the packing above."""
    if bits == 8:
        return packed[:, :count]
    halves: UInt8 = np.stack([packed & 15, packed >> 4], axis=-1)
    return halves.reshape(len(packed), -1)[:, :count]


def dequantize(quantized: Quantized, columns: int, bits: int) -> Float32:
    """The weights [N, columns] that the operators compute with."""
    rows, blocks = quantized.scales.shape
    values = unpack_bits(quantized.data.reshape(rows, -1), bits, quantized.data[0].size * 8 // bits).astype(np.float32)
    if quantized.zero_points is None:
        zeros = np.full((rows, blocks), 2 ** (bits - 1), np.float32)
    else:
        zeros = unpack_bits(quantized.zero_points, bits, blocks).astype(np.float32)
    centred = values.reshape(rows, blocks, -1) - zeros[:, :, None]
    weights: Float32 = (centred * quantized.scales[:, :, None]).reshape(rows, -1)[:, :columns]
    return weights
