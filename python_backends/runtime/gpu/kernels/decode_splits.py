"""How the tiles of a row's keys are shared among programs, and where these leave their parts.

By the row's own length: what shares a batch with a row does not change its result.
"""

from __future__ import annotations

from dataclasses import dataclass

from python_backends.runtime.gpu.kernels.lang import cdiv, jit, tl
from python_backends.runtime.gpu.kernels.paging import LayerKv, Rows
from python_backends.runtime.gpu.launch import Device, Tensor

MAX_SPLITS = 128


@jit
def row_tiles(past, num_queries, WINDOW: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, SHARE: tl.constexpr):
    """(first tile, number of tiles, programs that share them) of a row; at least SHARE tiles a program if it can be."""
    first = 0
    if WINDOW:
        first = tl.maximum(past - WINDOW + 1, 0) // BLOCK
    count = (past + num_queries + BLOCK - 1) // BLOCK - first
    return first, count, tl.minimum((count + SHARE - 1) // SHARE, SPLITS)


@dataclass(frozen=True)
class DecodeConfig:
    """What is chosen by measuring."""

    block: int
    """Tokens of a tile: a page, a part of one, or two."""
    splits: int
    """Programs that share a row's tiles."""
    share: int
    """Fewest tiles of a program."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Scratch:
    """Float32 buffers between the kernels, shared by all layers."""

    partial: Tensor
    maxima: Tensor
    sums: Tensor
    tile_maxima: Tensor
    tile_sums: Tensor

    @classmethod
    def allocate(cls, device: Device, tokens: int, heads: int, head_dim: int, rows: int, tiles: int) -> Scratch:
        """For steps of at most ``tokens`` (M) decode positions, ``MAX_SPLITS`` splits in a bucket of few of them.

        Args:
            device: where.
            tokens: largest M of a decode bucket.
            heads: H.
            head_dim: hd.
            rows: largest B of a bucket, of prefill too.
            tiles: `mass_tiles` of the layer whose masses are wanted.
        """
        lines = scratch_lines(tokens, heads)
        return cls(
            device.allocate("fp32", lines, head_dim),
            device.allocate("fp32", max(lines, rows * heads * MAX_SPLITS)),
            device.allocate("fp32", max(lines, rows * heads * MAX_SPLITS)),
            device.allocate("fp32", rows * heads * tiles),
            device.allocate("fp32", rows * heads * tiles),
        )


def scratch_lines(tokens: int, heads: int) -> int:
    """Partial results there is room for: M·H·splits of every bucket that `check_config` lets pass."""
    return max(heads * 8 * MAX_SPLITS, heads * tokens * 16)


def mass_tiles(kv: LayerKv) -> int:
    """Tiles of the smallest kind that a slot's table holds."""
    return kv.table.shape[1] * kv.page_tokens // 16


def default_config(
    heads: int, kv: LayerKv, rows: Rows, capability: int, multiprocessors: int | None = None
) -> DecodeConfig:
    """Splits that fill the card about twice; more where rows may differ in length, none where little is read."""
    programs = 2 * (multiprocessors or {89: 128}.get(capability, 132))
    parallel = rows.batch * kv.kv_heads
    splits = max(1, programs // parallel)
    longest = (kv.window or kv.table.shape[1] * kv.page_tokens) + rows.positions
    if not kv.window and rows.batch > 1:
        splits = max(splits, 4)
    row_bytes = kv.head_dim * _item_bytes(kv)
    block = 64 if row_bytes <= (512 if capability >= 90 else 256) else 32 if row_bytes <= 512 else 16
    block = min(kv.page_tokens, block)
    tiles = cdiv(longest, block) + 1
    share = 1 if rows.batch == 1 else 2
    stages = 3 if capability >= 90 else 2
    splits = min(splits, cdiv(tiles, share), MAX_SPLITS, max_splits(heads, rows))
    return DecodeConfig(block, splits, share, 4, stages)


def max_splits(heads: int, rows: Rows) -> int:
    """Splits that the scratch buffers hold for this bucket, whatever the largest one is."""
    return max(1, min(MAX_SPLITS, scratch_lines(rows.tokens, heads) // (rows.tokens * heads)))


def candidates(heads: int, kv: LayerKv, rows: Rows, capability: int) -> list[DecodeConfig]:
    """Configurations worth timing, the default first."""
    default = default_config(heads, kv, rows, capability)
    found = [default]
    tiles = cdiv((kv.window or kv.table.shape[1] * kv.page_tokens) + rows.positions, default.block) + 1
    for block in (32, 64, 128):
        for warps, stages in ((2, 3), (4, 2), (4, 3), (4, 4), (8, 3)):
            memory = stages * 2 * block * kv.head_dim * _item_bytes(kv)
            if memory > (96 if capability < 90 else 220) * 1024 or block > 2 * kv.page_tokens:
                continue
            for factor in (0.5, 1, 2, 4):
                splits = min(max(1, int(default.splits * factor)), tiles, max_splits(heads, rows))
                config = DecodeConfig(block, splits, default.share, warps, stages)
                if config not in found:
                    found.append(config)
    return found


def _item_bytes(kv: LayerKv) -> int:
    return kv.pool.num_bytes // kv.pool.size


def splitting(kv: LayerKv, rows: Rows, config: DecodeConfig) -> dict[str, int]:
    """Constants that all kernels of one attention share."""
    return {
        "S": rows.positions,
        "WINDOW": kv.window,
        "BLOCK": config.block,
        "SPLITS": config.splits,
        "SHARE": config.share,
    }
