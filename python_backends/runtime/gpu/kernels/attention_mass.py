"""The attention mass of KV blocks: what a row's last token gives to each, a by-product of decode attention.

`decode_attention.decode_kernel` leaves the largest score and the sum of every tile; here they become shares.
"""

from __future__ import annotations

from dataclasses import dataclass

from python_backends.runtime.gpu.kernels.decode_splits import DecodeConfig, Scratch, mass_tiles, row_tiles, splitting
from python_backends.runtime.gpu.kernels.lang import cdiv, jit, power_of_two, tl
from python_backends.runtime.gpu.kernels.paging import LayerKv, Rows
from python_backends.runtime.gpu.launch import Launch, Tensor


@jit
def mass_kernel(
    maxima,
    sums,
    tile_maxima,
    tile_sums,
    past_len,
    query_len,
    mass,
    S: tl.constexpr,
    H: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    SHARE: tl.constexpr,
    TILES: tl.constexpr,
    MASS_BLOCKS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PER_BLOCK_LANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    ONLY_LAST: tl.constexpr,
):
    """Grid (B, mass blocks / BLOCKS): what the last query's shares of the tiles add up to, averaged over heads."""
    row = tl.program_id(0)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    num_queries = tl.load(query_len + row)
    past = tl.load(past_len + row)
    start = past
    if ONLY_LAST:
        start = past + num_queries - 1
    first, count, active = row_tiles(start, past + num_queries - start, WINDOW, BLOCK, SPLITS, SHARE)
    lanes = tl.arange(0, LANES)
    live = (lanes < active) & (num_queries > 0)
    inside = tl.arange(0, PER_BLOCK_LANES)[None, :]
    tiles = blocks[:, None] * PER_BLOCK + inside
    # Tiles of an idle row were not written; masses of tiles outside a window are 0.
    there = (tiles >= first) & (tiles < first + count) & (inside < PER_BLOCK) & (num_queries > 0)
    result = tl.zeros([BLOCKS], tl.float32)
    for head in range(H):
        if ONLY_LAST:
            line = row * H + head
        else:
            line = (row * S + tl.maximum(num_queries - 1, 0)) * H + head
        highs = tl.load(maxima + line * SPLITS + lanes, mask=live, other=float("-inf"))
        highest = tl.max(highs, 0)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        denominator = tl.sum(tl.load(sums + line * SPLITS + lanes, mask=live, other=0.0) * tl.exp2(highs - highest), 0)
        denominator = tl.where(denominator > 0.0, denominator, 1.0)
        at = (row * H + head) * TILES + tiles
        high = tl.load(tile_maxima + at, mask=there, other=float("-inf"))
        share = tl.load(tile_sums + at, mask=there, other=0.0)
        result += tl.sum(share * tl.exp2(high - highest), 1) / denominator
    tl.store(mass + row * MASS_BLOCKS + blocks, result / H, mask=blocks < MASS_BLOCKS)


@dataclass(frozen=True)
class Mass:
    """Where the masses of the rows' last queries go."""

    output: Tensor
    """float32 [B, blocks]; a row that is not idle sums to 1 (if there are enough blocks), an idle one is 0."""
    block_tokens: int
    """A multiple of the page."""


def masses(
    heads: int, kv: LayerKv, rows: Rows, scratch: Scratch, config: DecodeConfig, mass: Mass, *, only_last: bool
) -> Launch:
    """From the parts that a decode kernel which wanted masses left; ``only_last`` as that kernel was told."""
    count = mass.output.shape[1]
    per_block = mass.block_tokens // config.block
    blocks = max(1, min(64, power_of_two(count), 512 // power_of_two(per_block)))
    return Launch(
        "attention_mass.mass_kernel",
        (rows.batch, cdiv(count, blocks), 1),
        (
            *(scratch.maxima, scratch.sums, scratch.tile_maxima, scratch.tile_sums),
            *(rows.past_len, rows.query_len, mass.output),
        ),
        {
            **splitting(kv, rows, config),
            "H": heads,
            "LANES": power_of_two(config.splits),
            "TILES": mass_tiles(kv),
            "MASS_BLOCKS": count,
            "PER_BLOCK": per_block,
            "PER_BLOCK_LANES": power_of_two(per_block),
            "BLOCKS": blocks,
            "ONLY_LAST": only_last,
        },
    )
