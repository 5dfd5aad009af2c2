"""How products are cut up: sizes of tiles, programs and stages for a weight, a number of tokens and a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from python_backends.runtime.gpu.device_weights import Matrix
from python_backends.runtime.gpu.kernels.lang import cdiv, power_of_two
from python_backends.runtime.gpu.kernels.norm import Quantized
from python_backends.runtime.gpu.launch import DTYPES, Tensor
from python_backends.runtime.gpu.weights import GROUP

SKINNY_TOKENS = 64
"""Up to here one tile holds all tokens."""


@dataclass(frozen=True)
class Config:
    """How a product is cut up."""

    block_n: int
    """Rows of the weight in a tile."""
    block_m: int
    """Tokens in a tile."""
    block_k: int
    split: int
    """Programs that share K."""
    num_warps: int
    num_stages: int
    group: int = 8
    """Token tiles whose programs run side by side over one weight tile after the other, so that both stay in L2."""


def split_parts(weight: Matrix, tokens: int, capability: int) -> int:
    """Parts that a product for ``tokens`` tokens is best split into."""
    return _skinny(weight, tokens, capability, gated=False).split if tokens <= SKINNY_TOKENS else 1


def choose(weight: Matrix, x: Tensor | Quantized, capability: int, *, gated: bool = False) -> Config:
    """What was fastest on an H200, or what should be."""
    tokens = (x.data if isinstance(x, Quantized) else x).shape[0]
    if tokens <= SKINNY_TOKENS:
        return _skinny(weight, tokens, capability, gated=gated)
    return _tiled(weight, tokens, capability, gated=gated)


def candidates(weight: Matrix, x: Tensor | Quantized, capability: int, *, gated: bool = False) -> list[Config]:
    """Configurations worth timing, `choose`'s first."""
    best = choose(weight, x, capability, gated=gated)
    tokens = (x.data if isinstance(x, Quantized) else x).shape[0]
    found = [best]
    for block_n in (32, 64, 128):
        for block_k in (64, 128, 256):
            for warps in (4, 8):
                for stages in (2, 3, 4, 5, 6):
                    blocks: tuple[int, ...] = (best.block_m,)
                    splits: tuple[int, ...] = (1,)
                    if tokens <= SKINNY_TOKENS:
                        splits = (1,) if gated else tuple(sorted({1, 2, 4, best.split}))
                    else:
                        blocks = (64, 128, 256)
                    found += [
                        Config(block_n, block_m, block_k, split, warps, stages)
                        for block_m in blocks
                        for split in splits
                    ]
    return [
        config
        for config in dict.fromkeys(found)
        if _fits(config, weight, x, capability, gated)
        and (storage_of(weight) != "int4" or GROUP % config.block_k == 0)
        and config.block_n * config.block_m * (2 if gated else 1) <= 32 * 256 * config.num_warps // 2
    ]


def _skinny(weight: Matrix, tokens: int, capability: int, *, gated: bool) -> Config:
    """For few tokens: everything for bytes in flight."""
    block_m = max(16, power_of_two(tokens))
    width = DTYPES[weight.data.dtype].itemsize
    rows = weight.rows // 2 if gated else weight.rows
    block_k = min(128, max(16, power_of_two(weight.columns)))
    block_n = 64 if rows >= 64 else max(16, power_of_two(rows))
    programs = cdiv(rows, block_n)
    split = 1
    while (
        not gated and programs * split < 256 and programs < 120 and split < 4 and weight.columns // (2 * split) >= 512
    ):
        split *= 2
    warps = 8 if split > 1 and weight.columns >= 16384 else 4
    if storage_of(weight) == "int4":
        config = Config(block_n, block_m, block_k, split, 4, 4)
    elif width == 1:
        config = Config(block_n, block_m, block_k, split, warps, 4)
    elif gated:
        config = Config(block_n, block_m, min(64, block_k), 1, 4, 3)
    else:
        config = Config(block_n, block_m, block_k, split, warps, 3 if split > 1 else 5)
    return _shrunk(config, weight, capability, gated, max(width, 2))


def _tiled(weight: Matrix, tokens: int, capability: int, *, gated: bool) -> Config:
    """For many tokens: large tiles, so that the tensor cores are what is waited for."""
    width = DTYPES[weight.data.dtype].itemsize
    wide = capability >= 90 and width == 2
    block_m = min(256 if wide and not gated else 128, power_of_two(tokens))
    block_n = min(128, max(16, power_of_two(weight.rows)))
    block_k = min(128 if width == 1 else 64, max(16, power_of_two(weight.columns)))
    if width == 4:
        block_m, block_n, block_k = min(64, block_m), min(64, block_n), min(32, block_k)
    return _shrunk(Config(block_n, block_m, block_k, 1, 8, 4 if wide else 3), weight, capability, gated, max(width, 2))


def _shrunk(config: Config, weight: Matrix, capability: int, gated: bool, width: int) -> Config:
    """As many stages as shared memory holds."""
    while config.num_stages > 1 and _shared_bytes(config, weight, gated, width) > _shared_limit(capability):
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def _fits(config: Config, weight: Matrix, x: Tensor | Quantized, capability: int, gated: bool) -> bool:
    width = DTYPES[(x.data if isinstance(x, Quantized) else x).dtype].itemsize
    return _shared_bytes(config, weight, gated, width) <= _shared_limit(capability)


def _shared_bytes(config: Config, weight: Matrix, gated: bool, width: int) -> int:
    """Of the tiles in flight; ``width`` bytes an activation."""
    row = config.block_k // 2 if storage_of(weight) == "int4" else config.block_k * DTYPES[weight.data.dtype].itemsize
    tile = config.block_n * row * (2 if gated else 1) + config.block_m * config.block_k * width
    return tile * config.num_stages


def _shared_limit(capability: int) -> int:
    """Bytes a program may use, less what the compiler adds to the tiles."""
    kib = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(capability, 99)
    return (kib - 4) * 1024


def storage_of(weight: Matrix) -> str:
    """How the kernel reads it: "float", "row" (eight bits and a scale a row) or "int4"."""
    return "float" if weight.scale is None else "int4" if weight.data.dtype == "u8" else "row"
