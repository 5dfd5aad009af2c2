"""Attention of a few new tokens a row over the KV pages: decode steps, and drafts that are verified at once.

A row's keys are read once by each key head, from the live pages alone, split over several programs (Flash-Decoding) by
the row's own length: what shares a batch with a row does not change its result. Each program keeps an online softmax in
float32 and leaves (max, sum, weighted values); `combine` joins them in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

from python_backends.runtime.gpu.kernels.lang import cdiv, jit, power_of_two, tl
from python_backends.runtime.gpu.kernels.paging import LayerKv, Rows, tile_pages, tile_rows
from python_backends.runtime.gpu.launch import Device, Launch, Tensor

MAX_SPLITS = 128
_LOG2_E = tl.constexpr(1.4426950408889634)


@jit
def row_tiles(past, num_queries, WINDOW: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, SHARE: tl.constexpr):
    """(first tile, number of tiles, programs that share them) of a row; at least SHARE tiles a program if it can be."""
    first = 0
    if WINDOW:
        first = tl.maximum(past - WINDOW + 1, 0) // BLOCK
    count = (past + num_queries + BLOCK - 1) // BLOCK - first
    return first, count, tl.minimum((count + SHARE - 1) // SHARE, SPLITS)


@jit
def decode_kernel(
    query,
    pages,
    table,
    past_len,
    query_len,
    slot_base,
    output,
    partial,
    maxima,
    sums,
    tile_maxima,
    tile_sums,
    S: tl.constexpr,
    G: tl.constexpr,
    KV: tl.constexpr,
    HD: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARE: tl.constexpr,
    TILES: tl.constexpr,
    WANT_MASS: tl.constexpr,
    ONLY_LAST: tl.constexpr,
):
    """Grid (B, KV, SPLITS). ``ONLY_LAST``: the masses of the row's last query and nothing else."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    num_queries = tl.load(query_len + row)
    past = tl.load(past_len + row)
    total = past + num_queries
    lines = tl.arange(0, ROWS)
    columns = tl.arange(0, HD)
    if ONLY_LAST:
        offsets = num_queries - 1 + lines * 0
        exists = (lines < G) & (num_queries > 0)
        token = row * S + offsets
        past = total - 1
    else:
        offsets = lines // G
        exists = lines < S * G
        token = row * S + offsets
    query_head = token * (KV * G) + head * G + lines % G
    valid = exists & (offsets < num_queries)
    if num_queries == 0:
        if SPLITS == 1 and not ONLY_LAST:
            to = output + query_head[:, None] * HD + columns[None, :]
            tl.store(to, tl.zeros([ROWS, HD], output.dtype.element_ty), mask=exists[:, None])
        return
    first, count, active = row_tiles(past, total - past, WINDOW, BLOCK, SPLITS, SHARE)
    if split >= active:
        return

    # Float16 holds every value of an 8-bit page, and converts faster than bfloat16.
    product = tl.float16 if pages.dtype.element_ty == tl.float8e4nv else pages.dtype.element_ty
    q = tl.load(query + query_head.to(tl.int64)[:, None] * HD + columns[None, :], mask=valid[:, None], other=0.0)
    q = q.to(product)
    if ONLY_LAST:
        limits = past + lines * 0
    else:
        limits = past + tl.minimum(offsets, num_queries - 1)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, HD], tl.float32)
    table_row = table + (tl.load(slot_base) + row) * WIDTH
    head_pages = pages + head * (PAGE * HD)
    begin = first + count * split // active
    end = first + count * (split + 1) // active
    page, page2 = tile_pages(table_row, begin, total, BLOCK, PAGE, WIDTH)
    for tile in range(begin, end):
        positions = tile * BLOCK + tl.arange(0, BLOCK)
        place = tile_rows(page, page2, tile, BLOCK, PAGE, PAGE_STRIDE, HD)
        page, page2 = tile_pages(table_row, tile + 1, total, BLOCK, PAGE, WIDTH)
        keys = tl.load(head_pages + place[:, None] + columns[None, :])
        scores = tl.dot(q, tl.trans(keys.to(product)), input_precision="ieee") * _LOG2_E
        seen = positions[None, :] <= limits[:, None]
        if WINDOW:
            seen = seen & (positions[None, :] > limits[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, 1))
        # Early tiles may hold nothing that a later draft sees.
        reference = tl.where(highest == float("-inf"), 0.0, highest)
        shares = tl.exp2(scores - reference[:, None])
        tile_sum = tl.sum(shares, 1)
        keep = tl.exp2(maximum - reference)
        denominator = denominator * keep + tile_sum
        maximum = highest
        if not ONLY_LAST:
            # What was never written may read as NaN, and a share of zero does not silence that.
            alive = positions < total
            if WINDOW:
                alive = alive & (positions > past - WINDOW)
            values = tl.load(
                head_pages + KV * PAGE * HD + place[:, None] + columns[None, :], mask=alive[:, None], other=0.0
            )
            weighted = weighted * keep[:, None]
            weighted = tl.dot(shares.to(product), values.to(product), weighted, input_precision="ieee")
        if WANT_MASS:
            to = (row * KV * G + head * G + lines % G) * TILES + tile
            last = exists & (offsets == num_queries - 1)
            tl.store(tile_maxima + to, reference, mask=last)
            tl.store(tile_sums + to, tile_sum, mask=last)

    if ONLY_LAST:
        to = (row * KV * G + head * G + lines) * SPLITS + split
        tl.store(maxima + to, maximum, mask=exists)
        tl.store(sums + to, denominator, mask=exists)
    elif SPLITS == 1 and not WANT_MASS:
        result = tl.where(valid[:, None], weighted / denominator[:, None], 0.0)
        to = output + query_head.to(tl.int64)[:, None] * HD + columns[None, :]
        tl.store(to, result.to(output.dtype.element_ty), mask=exists[:, None])
    else:
        to = query_head * SPLITS + split
        tl.store(maxima + to, maximum, mask=valid)
        tl.store(sums + to, denominator, mask=valid)
        tl.store(partial + to.to(tl.int64)[:, None] * HD + columns[None, :], weighted, mask=valid[:, None])


@jit
def combine_kernel(
    partial,
    maxima,
    sums,
    past_len,
    query_len,
    output,
    S: tl.constexpr,
    H: tl.constexpr,
    HD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    SHARE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (M, H, hd / COLUMNS)."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    row = token // S
    num_queries = tl.load(query_len + row)
    _, _, active = row_tiles(tl.load(past_len + row), num_queries, WINDOW, BLOCK, SPLITS, SHARE)
    lanes = tl.arange(0, LANES)
    live = (lanes < active) & (token % S < num_queries)
    at = (token * H + head) * SPLITS + lanes
    highs = tl.load(maxima + at, mask=live, other=float("-inf"))
    highest = tl.max(highs, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    scale = tl.exp2(highs - highest)
    denominator = tl.sum(tl.load(sums + at, mask=live, other=0.0) * scale, 0)
    parts = tl.load(partial + at.to(tl.int64)[:, None] * HD + columns[None, :], mask=live[:, None], other=0.0)
    result = tl.sum(parts * scale[:, None], 0) / tl.where(denominator > 0.0, denominator, 1.0)
    tl.store(output + (token * H + head).to(tl.int64) * HD + columns, result.to(output.dtype.element_ty))


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


@dataclass(frozen=True)
class Mass:
    """Where the masses of the rows' last queries go."""

    output: Tensor
    """float32 [B, blocks]; a row that is not idle sums to 1 (if there are enough blocks), an idle one is 0."""
    block_tokens: int
    """A multiple of the page."""


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


def decode_attention(
    query: Tensor,
    kv: LayerKv,
    rows: Rows,
    output: Tensor,
    scratch: Scratch,
    *,
    capability: int,
    config: DecodeConfig | None = None,
    mass: Mass | None = None,
) -> list[Launch]:
    """Attention of at most eight positions a row, causal among themselves, whose KV lies in the pages already.

    Args:
        query: [M, H, hd] normed, rotated and scaled.
        kv: the layer's pages.
        rows: the step's rows, S at most 8.
        output: [M, H·hd]; 0 at padding.
        scratch: contents mean nothing before and after.
        capability: 90 for 9.0.
        config: the default's if None.
        mass: also write the masses of each row's last valid query.
    """
    heads = query.shape[1]
    config = config or default_config(heads, kv, rows, capability)
    launches = [_decode(query, kv, rows, output, scratch, config, want_mass=mass is not None, only_last=False)]
    if config.splits > 1 or mass:
        columns = min(kv.head_dim, max(16, 4096 // power_of_two(config.splits)))
        launches.append(
            Launch(
                "decode_attention.combine_kernel",
                (rows.tokens, heads, kv.head_dim // columns),
                (scratch.partial, scratch.maxima, scratch.sums, rows.past_len, rows.query_len, output),
                {
                    **_splitting(kv, rows, config),
                    "H": heads,
                    "HD": kv.head_dim,
                    "COLUMNS": columns,
                    "LANES": power_of_two(config.splits),
                },
                num_warps=2 if config.splits * columns <= 2048 else 4,
            )
        )
    if mass:
        launches.append(_mass(heads, kv, rows, scratch, config, mass, only_last=False))
    return launches


def last_query_mass(
    query: Tensor,
    kv: LayerKv,
    rows: Rows,
    scratch: Scratch,
    mass: Mass,
    *,
    capability: int,
    config: DecodeConfig | None = None,
) -> list[Launch]:
    """The masses of each row's last valid query alone, for chunks of any length, after their KV was appended.

    Args:
        query: [M, H, hd] normed, rotated and scaled.
        kv: the pages of a layer that sees everything.
        rows: the step's rows.
        scratch: contents mean nothing before and after.
        mass: where the masses go.
        capability: 90 for 9.0.
        config: the default's if None.
    """
    heads = query.shape[1]
    single = Rows(rows.past_len, rows.query_len, rows.slot_base, 1)
    config = config or default_config(heads, kv, single, capability)
    return [
        _decode(query, kv, rows, None, scratch, config, want_mass=True, only_last=True),
        _mass(heads, kv, rows, scratch, config, mass, only_last=True),
    ]


def _splitting(kv: LayerKv, rows: Rows, config: DecodeConfig) -> dict[str, int]:
    return {
        "S": rows.positions,
        "WINDOW": kv.window,
        "BLOCK": config.block,
        "SPLITS": config.splits,
        "SHARE": config.share,
    }


def _decode(
    query: Tensor,
    kv: LayerKv,
    rows: Rows,
    output: Tensor | None,
    scratch: Scratch,
    config: DecodeConfig,
    *,
    want_mass: bool,
    only_last: bool,
) -> Launch:
    group = query.shape[1] // kv.kv_heads
    lines = group * (1 if only_last else rows.positions)
    return Launch(
        "decode_attention.decode_kernel",
        (rows.batch, kv.kv_heads, config.splits),
        (
            *(query, kv.pages, kv.table, rows.past_len, rows.query_len, rows.slot_base, output),
            *(None if only_last else scratch.partial, scratch.maxima, scratch.sums),
            *(scratch.tile_maxima if want_mass else None, scratch.tile_sums if want_mass else None),
        ),
        {
            **kv.constants,
            **_splitting(kv, rows, config),
            "G": group,
            "ROWS": max(16, power_of_two(lines)),
            "TILES": mass_tiles(kv),
            "WANT_MASS": want_mass,
            "ONLY_LAST": only_last,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _mass(
    heads: int, kv: LayerKv, rows: Rows, scratch: Scratch, config: DecodeConfig, mass: Mass, *, only_last: bool
) -> Launch:
    count = mass.output.shape[1]
    per_block = mass.block_tokens // config.block
    blocks = max(1, min(64, power_of_two(count), 512 // power_of_two(per_block)))
    return Launch(
        "decode_attention.mass_kernel",
        (rows.batch, cdiv(count, blocks), 1),
        (
            *(scratch.maxima, scratch.sums, scratch.tile_maxima, scratch.tile_sums),
            *(rows.past_len, rows.query_len, mass.output),
        ),
        {
            **_splitting(kv, rows, config),
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
