"""Attention of a chunk of a prompt: over the past in the pages, and over the chunk's own keys, which are in none yet.

Tiles of queries against tiles of keys with an online softmax (FlashAttention-2). A tile of keys that every query of the
tile sees takes no mask; those are the past and what lies below the diagonal, but for the window's edges.
"""

from __future__ import annotations

from dataclasses import dataclass

from python_backends.runtime.gpu.kernels.lang import cdiv, jit, power_of_two, tl
from python_backends.runtime.gpu.kernels.paging import LayerKv, Rows, tile_pages, tile_rows, widened
from python_backends.runtime.gpu.launch import DTYPES, Launch, Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)
_SCAN = tl.constexpr(1024)


@jit
def _attend(
    weighted,
    denominator,
    maximum,
    q,
    queries,
    groups,
    keys_at,
    values_at,
    begin,
    end,
    limit,
    table_row,
    key_groups,
    FROM_PAGES: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_IMAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HD: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
):
    """Take in the tiles of keys ``begin … end − 1``, counted from where ``queries`` are; keys from ``limit`` on do not
    exist."""
    columns = tl.arange(0, HD)
    page = 0
    page2 = 0
    if FROM_PAGES:
        page, page2 = tile_pages(table_row, begin, limit, BLOCK_N, PAGE, WIDTH)
    for tile in range(begin, end):
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if FROM_PAGES:
            place = tile_rows(page, page2, tile, BLOCK_N, PAGE, PAGE_STRIDE, HD)
            page, page2 = tile_pages(table_row, tile + 1, limit, BLOCK_N, PAGE, WIDTH)
        else:
            place = tokens * TOKEN_STRIDE
        at = place[:, None] + columns[None, :]
        if MASKED:
            # Nothing is known of what lies outside: a share of zero does not silence a NaN.
            alive = tokens < limit
            keys = tl.load(keys_at + at, mask=alive[:, None], other=0.0)
        else:
            keys = tl.load(keys_at + at)
        scores = tl.dot(q, tl.trans(widened(keys, q.dtype)), input_precision="ieee")
        if MASKED:
            seen = alive[None, :]
            if CAUSAL:
                before = tokens[None, :] <= queries[:, None]
                if HAS_IMAGES:
                    others = tl.load(key_groups + tokens, mask=alive, other=-1)
                    before = before | ((groups[:, None] == others[None, :]) & (groups >= 0)[:, None])
                seen = seen & before
            if WINDOW:
                seen = seen & (tokens[None, :] > queries[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, 1) * _LOG2_E)
        reference = highest
        if MASKED:
            reference = tl.where(highest == float("-inf"), 0.0, highest)
        shares = tl.exp2(scores * _LOG2_E - reference[:, None])
        keep = tl.exp2(maximum - reference)
        denominator = denominator * keep + tl.sum(shares, 1)
        maximum = highest
        if MASKED:
            values = tl.load(values_at + at, mask=alive[:, None], other=0.0)
        else:
            values = tl.load(values_at + at)
        weighted = weighted * keep[:, None]
        weighted = tl.dot(shares.to(q.dtype), widened(values, q.dtype), weighted, input_precision="ieee")
    return weighted, denominator, maximum


@jit
def prefill_kernel(
    query,
    fresh,
    pages,
    table,
    past_len,
    query_len,
    slot_base,
    image_group,
    output,
    S: tl.constexpr,
    G: tl.constexpr,
    KV: tl.constexpr,
    HD: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_IMAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (tiles of S, H, B); the last tiles, which have most to do, first."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    row = tl.program_id(2)
    past = tl.load(past_len + row)
    num_queries = tl.load(query_len + row)
    offsets = start + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, HD)
    line = (row * S).to(tl.int64)
    at = ((line + offsets) * (KV * G * HD) + head * HD)[:, None] + columns[None, :]
    within = (offsets < S)[:, None]
    if start >= num_queries:
        tl.store(output + at, tl.zeros([BLOCK_M, HD], output.dtype.element_ty), mask=within)
        return
    q = tl.load(query + at, mask=(offsets < num_queries)[:, None], other=0.0)
    stop = tl.minimum(start + BLOCK_M, num_queries)
    kv_head = head // G
    weighted = tl.zeros([BLOCK_M, HD], tl.float32)
    denominator = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)

    # The past, in positions. From `some` on the first query sees keys, from `every` on the last one does.
    table_row = table + (tl.load(slot_base) + row) * WIDTH
    keys_at = pages + kv_head * (PAGE * HD)
    values_at = keys_at + KV * PAGE * HD
    queries = past + offsets
    some = 0
    every = 0
    end = (past + BLOCK_N - 1) // BLOCK_N
    if WINDOW:
        some = tl.minimum(tl.maximum(past + start - WINDOW + 1, 0) // BLOCK_N, end)
        every = tl.minimum((tl.maximum(past + stop - WINDOW, 0) + BLOCK_N - 1) // BLOCK_N, end)
        weighted, denominator, maximum = _attend(
            *(weighted, denominator, maximum, q, queries, 0, keys_at, values_at, some, every, past, table_row, 0),
            *(True, True, False, False, WINDOW, BLOCK_N, HD, PAGE, WIDTH, PAGE_STRIDE, 0),
        )
    whole = tl.maximum(every, past // BLOCK_N)
    weighted, denominator, maximum = _attend(
        *(weighted, denominator, maximum, q, queries, 0, keys_at, values_at, every, whole, past, table_row, 0),
        *(True, False, False, False, 0, BLOCK_N, HD, PAGE, WIDTH, PAGE_STRIDE, 0),
    )
    weighted, denominator, maximum = _attend(
        *(weighted, denominator, maximum, q, queries, 0, keys_at, values_at, whole, end, past, table_row, 0),
        *(True, True, False, False, WINDOW, BLOCK_N, HD, PAGE, WIDTH, PAGE_STRIDE, 0),
    )

    # The chunk, in offsets.
    keys_at = fresh + line * (2 * KV * HD) + kv_head * HD
    values_at = keys_at + KV * HD
    groups = 0
    key_groups = 0
    reach = stop
    if HAS_IMAGES:
        key_groups = image_group + row * S
        groups = tl.load(key_groups + offsets, mask=offsets < num_queries, other=-1)
        # An image's tokens are consecutive: the last query's image alone may go on behind the tile.
        last = tl.load(key_groups + stop - 1)
        if last >= 0:
            for scan in range(stop, num_queries, _SCAN):
                others = scan + tl.arange(0, _SCAN)
                same = tl.load(key_groups + others, mask=others < num_queries, other=-1) == last
                reach = tl.maximum(reach, tl.max(tl.where(same, others + 1, 0), 0))
    end = (reach + BLOCK_N - 1) // BLOCK_N
    diagonal = start // BLOCK_N
    every = 0
    if WINDOW:
        some = tl.minimum(tl.maximum(start - WINDOW + 1, 0) // BLOCK_N, diagonal)
        every = tl.minimum((tl.maximum(stop - WINDOW, 0) + BLOCK_N - 1) // BLOCK_N, diagonal)
        weighted, denominator, maximum = _attend(
            *(
                weighted,
                denominator,
                maximum,
                q,
                offsets,
                0,
                keys_at,
                values_at,
                some,
                every,
                num_queries,
                table_row,
                0,
            ),
            *(False, True, False, False, WINDOW, BLOCK_N, HD, PAGE, WIDTH, PAGE_STRIDE, 2 * KV * HD),
        )
    weighted, denominator, maximum = _attend(
        *(
            weighted,
            denominator,
            maximum,
            q,
            offsets,
            0,
            keys_at,
            values_at,
            every,
            diagonal,
            num_queries,
            table_row,
            0,
        ),
        *(False, False, False, False, 0, BLOCK_N, HD, PAGE, WIDTH, PAGE_STRIDE, 2 * KV * HD),
    )
    weighted, denominator, maximum = _attend(
        *(weighted, denominator, maximum, q, offsets, groups, keys_at, values_at, diagonal, end, num_queries),
        *(table_row, key_groups),
        *(False, True, True, HAS_IMAGES, WINDOW, BLOCK_N, HD, PAGE, WIDTH, PAGE_STRIDE, 2 * KV * HD),
    )

    result = weighted / tl.where(denominator > 0.0, denominator, 1.0)[:, None]
    result = tl.where((offsets < num_queries)[:, None], result, 0.0)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=within)


@dataclass(frozen=True)
class PrefillConfig:
    """What is chosen by measuring."""

    block_m: int
    """Queries of a tile."""
    block_n: int
    """Keys of a tile: a page, a part of one, or two."""
    num_warps: int
    num_stages: int


def candidates(query: Tensor, kv: LayerKv, rows: Rows, capability: int) -> list[PrefillConfig]:
    """Configurations worth timing, the best guess first."""
    wide, item = kv.head_dim > 128, DTYPES[query.dtype].itemsize
    if item == 4:  # no tensor cores: small tiles
        found = [PrefillConfig(16, 16, 4, 1)] if wide else [PrefillConfig(32, 16, 8, 1), PrefillConfig(32, 32, 8, 1)]
    elif capability >= 90:
        found = [PrefillConfig(*sizes) for sizes in (_HOPPER_WIDE if wide else _HOPPER)]
    else:
        found = [PrefillConfig(*sizes) for sizes in (_ADA_WIDE if wide else _ADA)]
    limit = max(16, power_of_two(rows.positions))
    return [config for config in found if config.block_m <= limit] or [
        PrefillConfig(limit, min(found[0].block_n, kv.page_tokens), 4, found[0].num_stages)
    ]


_HOPPER = ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 4), (64, 128, 4, 2))
_HOPPER_WIDE = ((128, 32, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 3), (128, 32, 8, 4))
_ADA = ((128, 32, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (128, 32, 8, 3))
_ADA_WIDE = ((64, 32, 8, 2), (64, 64, 8, 1), (64, 32, 4, 2), (64, 16, 4, 3), (64, 16, 8, 3))
"""(block_m, block_n, warps, stages), by card and by head_dim: 128, or 256."""


def prefill_attention(
    query: Tensor,
    fresh: Tensor,
    kv: LayerKv,
    rows: Rows,
    output: Tensor,
    *,
    capability: int,
    image_group: Tensor | None = None,
    config: PrefillConfig | None = None,
) -> Launch:
    """Attention of a chunk: causal, within the layer's window, and both ways among the tokens of an image.

    Args:
        query: [M, H, hd] normed, rotated and scaled; padding is not read.
        fresh: [M, 2·KV, hd] keys normed and rotated, then values, of the chunk; padding is not read.
        kv: the pages that hold the past; whether they hold the chunk too does not matter, unless in a ring it has
            overwritten what the window still covers.
        rows: the step's rows.
        output: [M, H·hd]; 0 at padding.
        capability: 90 for 9.0.
        image_group: int32 [B, S] equal non-negative numbers for an image's tokens, which are consecutive and lie in one
            chunk; −1 for text and padding. None for a chunk of text alone, which is faster.
        config: the first candidate if None.
    """
    heads = query.shape[1]
    config = config or candidates(query, kv, rows, capability)[0]
    return Launch(
        "prefill_attention.prefill_kernel",
        (cdiv(rows.positions, config.block_m), heads, rows.batch),
        (
            *(query, fresh, kv.pages, kv.table, rows.past_len, rows.query_len, rows.slot_base),
            *(image_group, output),
        ),
        {
            **kv.constants,
            "S": rows.positions,
            "G": heads // kv.kv_heads,
            "WINDOW": kv.window,
            "HAS_IMAGES": image_group is not None,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
