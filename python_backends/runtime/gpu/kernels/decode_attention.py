"""Attention of a few new tokens a row over the KV pages: decode steps, and drafts that are verified at once.

A row's keys are read once by each key head, from the live pages alone, split over several programs (Flash-Decoding) by
the row's own length: what shares a batch with a row does not change its result. Each program keeps an online softmax in
float32 and leaves (max, sum, weighted values); `combine` joins them in a fixed order.
"""

from __future__ import annotations

from python_backends.runtime.gpu.kernels.attention_mass import Mass, masses
from python_backends.runtime.gpu.kernels.decode_splits import (
    DecodeConfig,
    Scratch,
    default_config,
    mass_tiles,
    row_tiles,
    splitting,
)
from python_backends.runtime.gpu.kernels.lang import jit, power_of_two, tl
from python_backends.runtime.gpu.kernels.paging import LayerKv, Rows, tile_pages, tile_rows
from python_backends.runtime.gpu.launch import Launch, Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)


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
                    **splitting(kv, rows, config),
                    "H": heads,
                    "HD": kv.head_dim,
                    "COLUMNS": columns,
                    "LANES": power_of_two(config.splits),
                },
                num_warps=2 if config.splits * columns <= 2048 else 4,
            )
        )
    if mass:
        launches.append(masses(heads, kv, rows, scratch, config, mass, only_last=False))
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
        masses(heads, kv, rows, scratch, config, mass, only_last=True),
    ]


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
            **splitting(kv, rows, config),
            "G": group,
            "ROWS": max(16, power_of_two(lines)),
            "TILES": mass_tiles(kv),
            "WANT_MASS": want_mass,
            "ONLY_LAST": only_last,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
