"""Gemma's RMS norms around the residual stream, x · rsqrt(mean(x²) + ε) · γ with γ = 1 + w, one program a token.

A sublayer's output is normed and added to the stream, and the stream is normed for the next sublayer, in one launch.
Where a product was split along K, its float32 parts are added up here, in order. What a product in eight bits reads is
quantized here as well, with a scale per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from python_backends.runtime.gpu.kernels.lang import jit, power_of_two, tl
from python_backends.runtime.gpu.launch import Launch, Tensor


@dataclass(frozen=True)
class Quantized:
    """Activations [M, K] in eight bits, ``x ≈ data · scale``."""

    data: Tensor
    """fp8e4nv or i8."""
    scale: Tensor
    """float32 [M]"""


@jit
def put(values, output, output_scale, row, columns, inside, D: tl.constexpr, QUANTIZE: tl.constexpr):
    """Store a row, in eight bits with its scale where QUANTIZE is "fp8e4nv" or "i8"."""
    at = output + row.to(tl.int64) * D + columns
    if QUANTIZE == "":
        tl.store(at, values.to(output.dtype.element_ty), mask=inside)
    else:
        largest = tl.maximum(tl.max(tl.abs(values), 0), 1e-12)
        if QUANTIZE == "i8":
            limit = 127.0
        else:
            limit = 448.0
        scaled = values * (limit / largest)
        if QUANTIZE == "i8":
            scaled = tl.floor(scaled + 0.5)
        scaled = tl.minimum(tl.maximum(scaled, -limit), limit)
        tl.store(at, scaled.to(output.dtype.element_ty), mask=inside)
        tl.store(output_scale + row, largest / limit)


@jit
def normed(values, gamma, columns, inside, EPSILON: tl.constexpr, D: tl.constexpr):
    """RMS norm of a row in float32, zero outside."""
    mean = tl.sum(values * values, 0) / D
    return values * tl.rsqrt(mean + EPSILON) * tl.load(gamma + columns, mask=inside, other=0.0)


@jit
def norm_kernel(
    stream,
    positions,
    gamma,
    output,
    output_scale,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTIZE: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
):
    """Grid (rows,). With R, row b·R + r is the one at position ``positions[b, r]`` of row b's S; 0 for all rows."""
    row = tl.program_id(0)
    source = row.to(tl.int64)
    if R > 0:
        source = (row // R).to(tl.int64) * S + tl.load(positions + row)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    values = tl.load(stream + source * D + columns, mask=inside, other=0.0)
    put(normed(values, gamma, columns, inside, EPSILON, D), output, output_scale, row, columns, inside, D, QUANTIZE)


@jit
def add_norm_kernel(
    x,
    post_gamma,
    stream,
    pre_gamma,
    output,
    output_scale,
    EPSILON: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    NORM: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """Grid (M,). NORM: whether the stream is normed for what follows."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    at = row.to(tl.int64) * D + columns
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, SPLIT):
        values += tl.load(x + part * M * D + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(stream + at, mask=inside, other=0.0) + normed(values, post_gamma, columns, inside, EPSILON, D)
    tl.store(stream + at, total, mask=inside)
    if NORM:
        put(
            normed(total, pre_gamma, columns, inside, EPSILON, D),
            output,
            output_scale,
            row,
            columns,
            inside,
            D,
            QUANTIZE,
        )


@jit
def quantize_kernel(x, output, output_scale, D: tl.constexpr, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr):
    """Grid (M,)."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    values = tl.load(x + row.to(tl.int64) * D + columns, mask=inside, other=0.0).to(tl.float32)
    put(values, output, output_scale, row, columns, inside, D, QUANTIZE)


def norm(stream: Tensor, gamma: Tensor, output: Tensor | Quantized, *, epsilon: float) -> Launch:
    """The stream, float32 [M, D], normed into ``output`` [M, D]."""
    return _norm(stream, None, gamma, output, epsilon, stream.shape[0], 1, 0)


def gather_norm(
    stream: Tensor, positions: Tensor, gamma: Tensor, output: Tensor | Quantized, *, epsilon: float
) -> Launch:
    """The rows at ``positions`` int32 [B, R], each within its row's S of the stream's M = B·S, normed into [B·R, D]."""
    batch, wanted = positions.shape
    return _norm(stream, positions, gamma, output, epsilon, batch * wanted, stream.shape[0] // batch, wanted)


def _norm(
    stream: Tensor,
    positions: Tensor | None,
    gamma: Tensor,
    output: Tensor | Quantized,
    epsilon: float,
    rows: int,
    S: int,
    R: int,
) -> Launch:
    columns = stream.shape[1]
    data, scale, kind = _target(output)
    constants = {"EPSILON": epsilon, "D": columns, "BLOCK": power_of_two(columns), "QUANTIZE": kind, "S": S, "R": R}
    arguments = (stream, positions, gamma, data, scale)
    return Launch("norm.norm_kernel", (rows, 1, 1), arguments, constants, num_warps=_warps(columns))


def add_norm(
    x: Tensor,
    post_gamma: Tensor,
    stream: Tensor,
    pre_gamma: Tensor | None = None,
    output: Tensor | Quantized | None = None,
    *,
    epsilon: float,
) -> Launch:
    """``stream += norm(x) · post_gamma``, then ``output = norm(stream) · pre_gamma`` unless that is None.

    Args:
        x: a sublayer's output, [M, D], or its float32 parts [SPLIT, M, D].
        stream: float32 [M, D], in place.
    """
    tokens, columns = stream.shape
    data, scale, kind = _target(output)
    return Launch(
        "norm.add_norm_kernel",
        (tokens, 1, 1),
        (x, post_gamma, stream, pre_gamma, data, scale),
        {
            "EPSILON": epsilon,
            "M": tokens,
            "D": columns,
            "BLOCK": power_of_two(columns),
            "SPLIT": x.shape[0] if len(x.shape) == 3 else 1,
            "NORM": pre_gamma is not None,
            "QUANTIZE": kind,
        },
        num_warps=_warps(columns),
    )


def quantize(x: Tensor, output: Quantized) -> Launch:
    """Activations [M, K] in eight bits, for a product in eight bits."""
    rows, columns = x.shape
    data, scale, kind = _target(output)
    constants = {"D": columns, "BLOCK": power_of_two(columns), "QUANTIZE": kind}
    return Launch("norm.quantize_kernel", (rows, 1, 1), (x, data, scale), constants, num_warps=_warps(columns))


def _target(output: Tensor | Quantized | None) -> tuple[Tensor | None, Tensor | None, str]:
    """(data, scale, what to quantize to)"""
    if isinstance(output, Quantized):
        return output.data, output.scale, output.data.dtype
    return output, None, ""


def _warps(columns: int) -> int:
    """Threads for one row: a few elements each."""
    return 4 if columns <= 2048 else 8 if columns <= 4096 else 16
