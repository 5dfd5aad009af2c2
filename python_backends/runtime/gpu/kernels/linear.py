"""Products of activations [M, K] with a weight [N, K] in any storage, from one decode token to a prefill chunk.

The weight is the first operand of the tensor cores: its rows fill their 64 (or 16) rows, and tokens their columns,
which need only be a multiple of 8, so one form serves one token and thousands. A weight in four bits, or in eight that
meets wider activations, is widened in registers on the way. For few tokens the time is that of reading the weight: many
programs, each with several tiles in flight (``num_stages``); where the rows give too few programs, K is split and the
float32 parts are added up, in order, by whoever reads them.

Four bits: byte j of a row holds the values 2j (lower half) and 2j + 1. The lower halves of a tile are one matrix and
the upper ones another; they meet the even and the odd columns of the activations, so no value changes its place. Four
bytes become eight values by eleven instructions: masked, put by ``prmt`` under an exponent that makes 128 + v (or
1024 + v in float16) of them, less 136 (1032).
"""

from __future__ import annotations

import os
from dataclasses import replace

from python_backends.errors import InternalError
from python_backends.runtime.gpu.device_weights import Matrix
from python_backends.runtime.gpu.kernels.lang import cdiv, jit, tl
from python_backends.runtime.gpu.kernels.linear_config import Config, choose, storage_of
from python_backends.runtime.gpu.kernels.norm import Quantized
from python_backends.runtime.gpu.launch import Launch, Tensor
from python_backends.runtime.gpu.weights import GROUP

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_UNPACK_BF16 = tl.constexpr("""{
    .reg .b32 low, high, one, shift;
    mov.b32 one, 0x3F803F80;
    mov.b32 shift, 0xC308C308;
    and.b32 low, $4, 0x0F0F0F0F;
    shr.b32 high, $4, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 $0, low, 0x43434343, 0x4140;
    prmt.b32 $1, low, 0x43434343, 0x4342;
    prmt.b32 $2, high, 0x43434343, 0x4140;
    prmt.b32 $3, high, 0x43434343, 0x4342;
    fma.rn.bf16x2 $0, $0, one, shift;
    fma.rn.bf16x2 $1, $1, one, shift;
    fma.rn.bf16x2 $2, $2, one, shift;
    fma.rn.bf16x2 $3, $3, one, shift;
}""")
_UNPACK_FP16 = tl.constexpr("""{
    .reg .b32 low, high, shift;
    mov.b32 shift, 0x64086408;
    and.b32 low, $4, 0x0F0F0F0F;
    shr.b32 high, $4, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 $0, low, 0x64646464, 0x4140;
    prmt.b32 $1, low, 0x64646464, 0x4342;
    prmt.b32 $2, high, 0x64646464, 0x4140;
    prmt.b32 $3, high, 0x64646464, 0x4342;
    sub.rn.f16x2 $0, $0, shift;
    sub.rn.f16x2 $1, $1, shift;
    sub.rn.f16x2 $2, $2, shift;
    sub.rn.f16x2 $3, $3, shift;
}""")


@jit
def unpack(packed, DTYPE: tl.constexpr):
    """Bytes → (lower halves − 8, upper halves − 8)."""
    if _INTERPRETED or tl.float32 == DTYPE:
        low = ((packed & 15).to(tl.float32) - 8.0).to(DTYPE)
        high = ((packed >> 4).to(tl.float32) - 8.0).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            _UNPACK_BF16, "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        low, high = tl.inline_asm_elementwise(
            _UNPACK_FP16, "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return low, high


@jit
def multiply(a, b, acc):
    """``acc + a · b``; the interpreter knows no bfloat16 products."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def four_bit_step(
    acc, weight, weight_scale, even, odd, step, inside, N, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """``acc`` plus one tile of a weight in four bits; ``weight`` and ``weight_scale`` point to its first row."""
    rows, half = tl.arange(0, BN), step * (BK // 2) + tl.arange(0, BK // 2)
    at = weight + rows[:, None] * (K // 2) + half[None, :]
    scale_at = weight_scale + rows * ((K + GROUP - 1) // GROUP) + step * BK // GROUP
    if MASKED:
        packed = tl.load(at, mask=inside[:, None] & (half[None, :] < K // 2), other=0x88)
        scale = tl.load(scale_at, mask=inside, other=0.0)
    else:
        packed = tl.load(at)
        scale = tl.load(scale_at)
    low, high = unpack(packed, even.dtype)
    part = multiply(high, odd, multiply(low, even, tl.zeros_like(acc)))
    return acc + part * scale.to(tl.float32)[:, None]


@jit
def step_of(
    acc, weight, tokens, step, inside, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr
):
    """``acc`` plus one tile of a weight in eight bits or more; ``weight`` points to its first row."""
    rows, k = tl.arange(0, BN), step * BK + tl.arange(0, BK)
    at = weight + rows[:, None] * K + k[None, :]
    if MASKED:
        values = tl.load(at, mask=inside[:, None] & (k[None, :] < K), other=0.0)
    else:
        values = tl.load(at)
    # One return: the compiler also reads what follows a return inside a branch.
    if tokens.dtype == tl.int8:
        result = tl.dot(values, tokens, acc, out_dtype=tl.int32)
    elif tokens.dtype == tl.float8e4nv:
        # The tensor cores of sm_90 add fp8 products in 14 bits or so; every tile is added in float32.
        result = tl.dot(values, tokens, acc, max_num_imprecise_acc=BK)
    elif _INTERPRETED:  # which casts no integers to bfloat16
        result = multiply(values.to(tl.float32).to(tokens.dtype), tokens, acc)
    else:
        result = multiply(values.to(tokens.dtype), tokens, acc)
    return result


@jit
def product_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    output,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    TILES_M: tl.constexpr,
    TILES_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    STORAGE: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (tiles, SPLIT). STORAGE: "float", "row" (a scale per row) or "int4". GATED: rows N … 2N − 1 are the up
    projection's, and the output is gelu(gate) · up. N is the output's."""
    tile, part = tl.program_id(0), tl.program_id(1)
    group = tile // (GROUP_M * TILES_N)
    beside = tl.minimum(TILES_M - group * GROUP_M, GROUP_M)
    m_tile = group * GROUP_M + tile % (GROUP_M * TILES_N) % beside
    n_tile = tile % (GROUP_M * TILES_N) // beside

    n = n_tile * BN + tl.arange(0, BN)
    m = m_tile * BM + tl.arange(0, BM)
    inside = n < N
    WIDTH: tl.constexpr = K // 2 if STORAGE == "int4" else K
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    MASKED: tl.constexpr = N % BN != 0 or K % BK != 0
    first_row = (n_tile * BN).to(tl.int64)
    gate_at = weight + first_row * WIDTH
    up_at = gate_at + N * WIDTH
    gate_scale_at = weight_scale
    up_scale_at = weight_scale
    if STORAGE == "int4":
        gate_scale_at = weight_scale + first_row * GROUPS
        up_scale_at = gate_scale_at + N * GROUPS
    x_at = x + (m_tile * BM).to(tl.int64) * K
    token = tl.arange(0, BM)

    KIND: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    gate = tl.zeros((BN, BM), KIND)
    up = gate
    STEPS: tl.constexpr = (K + BK - 1) // BK
    SHARE: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    for step in tl.range(part * SHARE, tl.minimum(part * SHARE + SHARE, STEPS), num_stages=STAGES):
        k = step * BK + tl.arange(0, BK)
        if STORAGE == "int4":
            read = x_at + token[:, None] * K + k[None, :]
            if M % BM != 0 or K % BK != 0:
                tokens = tl.load(read, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
            else:
                tokens = tl.load(read)
            even, odd = tl.split(tl.reshape(tokens, (BM, BK // 2, 2)))
            even, odd = tl.trans(even), tl.trans(odd)
            gate = four_bit_step(gate, gate_at, gate_scale_at, even, odd, step, inside, N, K, BN, BK, GROUP, MASKED)
            if GATED:
                up = four_bit_step(up, up_at, up_scale_at, even, odd, step, inside, N, K, BN, BK, GROUP, MASKED)
        else:
            read = x_at + token[None, :] * K + k[:, None]
            if M % BM != 0 or K % BK != 0:
                tokens = tl.load(read, mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
            else:
                tokens = tl.load(read)
            gate = step_of(gate, gate_at, tokens, step, inside, K, BN, BK, MASKED)
            if GATED:
                up = step_of(up, up_at, tokens, step, inside, K, BN, BK, MASKED)

    result = gate.to(tl.float32)
    above = up.to(tl.float32)
    if STORAGE == "row":
        result *= tl.load(weight_scale + n, mask=inside, other=0.0)[:, None]
        if GATED:
            above *= tl.load(weight_scale + N + n, mask=inside, other=0.0)[:, None]
    if x_scale is not None:
        factor = tl.load(x_scale + m, mask=m < M, other=0.0)[None, :]
        result *= factor
        above *= factor
    if GATED:
        # gelu(g) = g · (1 + tanh(u)) / 2 = g / (1 + exp(−2u))
        inner = 0.7978845608028654 * (result + 0.044715 * result * result * result)
        result = result / (1.0 + tl.exp(tl.minimum(-2.0 * inner, 80.0))) * above
    at = output + (part * M + m[None, :]).to(tl.int64) * N + n[:, None]
    tl.store(at, result.to(output.dtype.element_ty), mask=inside[:, None] & (m < M)[None, :])


def product(
    weight: Matrix,
    x: Tensor | Quantized,
    output: Tensor,
    *,
    capability: int,
    gated: bool = False,
    config: Config | None = None,
) -> list[Launch]:
    """``output = x · weightᵀ``, or ``gelu_tanh(x · gateᵀ) · (x · upᵀ)``.

    Args:
        weight: [N, K]; with ``gated`` [2·N, K], the rows of gate and then those of up.
        x: [M, K] in the activations' type, or in eight bits where the weight is in the same eight bits.
        output: [M, N] in any floating type, or the float32 parts [SPLIT, M, N] of a sum, as many as `split_parts` says
            or as the caller likes. A gated product cannot be split.
        config: how to cut it up; `choose`'s by default.

    Raises:
        InternalError: the shapes or the types do not fit.
    """
    data, scale = (x.data, x.scale) if isinstance(x, Quantized) else (x, None)
    tokens, columns = data.shape
    rows = weight.rows // 2 if gated else weight.rows
    split = output.shape[0] if len(output.shape) == 3 else 1
    fits = columns == weight.columns and output.shape[-2:] == (tokens, rows)
    if not fits or (gated and split > 1) or (scale is not None and data.dtype != weight.data.dtype):
        raise InternalError(f"a product of {data} with {weight} does not give {output}")
    config = replace(config or choose(weight, x, capability, gated=gated), split=split)
    storage = storage_of(weight)
    if storage == "int4" and (columns % 2 or GROUP % config.block_k):
        raise InternalError(f"four-bit weights of {columns} columns in tiles of {config.block_k}")
    tiles_m, tiles_n = cdiv(tokens, config.block_m), cdiv(rows, config.block_n)
    constants = {
        "M": tokens,
        "N": rows,
        "K": columns,
        "BN": config.block_n,
        "BM": config.block_m,
        "BK": config.block_k,
        "TILES_M": tiles_m,
        "TILES_N": tiles_n,
        "GROUP_M": min(config.group, tiles_m),
        "SPLIT": split,
        "STORAGE": storage,
        "GATED": gated,
        "GROUP": GROUP,
        "STAGES": config.num_stages,
    }
    arguments = (data, scale, weight.data, weight.scale, output)
    grid = (tiles_m * tiles_n, split, 1)
    kernel = "linear.product_kernel"
    return [Launch(kernel, grid, arguments, constants, config.num_warps, config.num_stages)]
