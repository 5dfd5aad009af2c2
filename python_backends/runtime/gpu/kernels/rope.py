"""Head norms and rotation of queries and keys, and the new keys and values on their way into the pages.

Rotary embeddings as in Hugging Face's Gemma-3: halves of a head are rotated against each other, and the angle is the
float32 product of position and inverse frequency.
"""

from __future__ import annotations

from python_backends.runtime.gpu.kernels.lang import cdiv, jit, power_of_two, tl
from python_backends.runtime.gpu.kernels.paging import LayerKv, Rows, page_number
from python_backends.runtime.gpu.launch import Launch, Tensor

_TWO_OVER_PI = tl.constexpr(0.6366197723675814)
# π/2 in four pieces. The first three have seven bits, so that their products with a count below 2^17 are exact.
_HALF_PI_1 = tl.constexpr(1.5625)
_HALF_PI_2 = tl.constexpr(67.0 / 8192.0)
_HALF_PI_3 = tl.constexpr(123.0 / 1048576.0)
_HALF_PI_4 = tl.constexpr(1.5707963267948966 - 1.5625 - 67.0 / 8192.0 - 123.0 / 1048576.0)


@jit
def sin_cos(angle):
    """(sin, cos) of float32 angles from 0 to 2^17, within 2e-7.

    The hardware's approximations are for small angles only. Here the angle is reduced exactly (Cody and Waite), then
    come the polynomials of Cephes' sinf and cosf.
    """
    quarters = tl.floor(angle * _TWO_OVER_PI + 0.5)
    rest = angle - quarters * _HALF_PI_1
    rest = rest - quarters * _HALF_PI_2
    rest = rest - quarters * _HALF_PI_3
    rest = rest - quarters * _HALF_PI_4
    square = rest * rest
    sine = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * rest + rest
    cosine = ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square * square
    cosine = cosine - 0.5 * square + 1.0
    quadrant = quarters.to(tl.int32)
    swapped = (quadrant & 1) == 1
    sin = tl.where(swapped, cosine, sine)
    cos = tl.where(swapped, sine, cosine)
    return tl.where((quadrant & 2) == 2, -sin, sin), tl.where(((quadrant + 1) & 2) == 2, -cos, cos)


@jit
def rope_append_kernel(
    qkv,
    query_gamma,
    key_gamma,
    inverse_frequency,
    past_len,
    query_len,
    slot_base,
    table,
    pages,
    query,
    fresh,
    H: tl.constexpr,
    KV: tl.constexpr,
    HD: tl.constexpr,
    S: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    APPEND: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
):
    """Grid (M, blocks of heads): some heads of one token, in two halves."""
    token = tl.program_id(0)
    row = token // S
    offset = token % S
    past = tl.load(past_len + row)
    num_queries = tl.load(query_len + row)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, HD // 2)
    exists = heads < H + 2 * KV
    source = (heads * HD)[:, None] + half[None, :]
    # Padding reads nothing and becomes zeros, so that whatever lies there spreads no NaN.
    wanted = (exists & (offset < num_queries))[:, None] & (half < HD)[None, :]
    first = tl.zeros([HEADS, HD // 2], tl.float32)
    second = tl.zeros([HEADS, HD // 2], tl.float32)
    for part in tl.static_range(SPLIT):
        line = qkv + (part * TOKENS + token).to(tl.int64) * ((H + 2 * KV) * HD)
        first += tl.load(line + source, mask=wanted, other=0.0).to(tl.float32)
        second += tl.load(line + source + HD // 2, mask=wanted, other=0.0).to(tl.float32)

    is_query = (heads < H)[:, None]
    is_value = (heads >= H + KV)[:, None]
    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HD + EPS)[:, None]
    gamma = tl.where(is_query, tl.load(query_gamma + half)[None, :], tl.load(key_gamma + half)[None, :])
    gamma2 = tl.where(
        is_query, tl.load(query_gamma + HD // 2 + half)[None, :], tl.load(key_gamma + HD // 2 + half)[None, :]
    )
    # A fused multiply-add rounds the product, and cannot be fused with the subtraction that follows.
    angle = tl.fma(tl.load(inverse_frequency + half), (past + offset).to(tl.float32), 0.0)
    sin, cos = sin_cos(angle)
    a = first * scale * gamma
    b = second * scale * gamma2
    rotated = tl.where(is_value, first, a * cos[None, :] - b * sin[None, :])
    rotated2 = tl.where(is_value, second, b * cos[None, :] + a * sin[None, :])

    to = query + token.to(tl.int64) * (H * HD) + source
    keep = is_query & (half < HD)[None, :]
    tl.store(to, rotated.to(query.dtype.element_ty), mask=keep)
    tl.store(to + HD // 2, rotated2.to(query.dtype.element_ty), mask=keep)
    lane = heads - H  # keys, then values
    keep = (exists & (lane >= 0))[:, None] & (half < HD)[None, :]
    # Rounded to the activations' type first: pages of another type hold what `append_kernel` would write.
    rotated = rotated.to(fresh.dtype.element_ty)
    rotated2 = rotated2.to(fresh.dtype.element_ty)
    to = fresh + token.to(tl.int64) * (2 * KV * HD) + (lane * HD)[:, None] + half[None, :]
    tl.store(to, rotated, mask=keep)
    tl.store(to + HD // 2, rotated2, mask=keep)
    # Of a chunk longer than the ring its end alone is kept, so that no two tokens go to one place.
    if APPEND and (offset < num_queries) & (offset >= num_queries - WIDTH * PAGE):
        position = past + offset
        page = page_number(table + (tl.load(slot_base) + row) * WIDTH, position // PAGE, WIDTH)
        place = pages + page * PAGE_STRIDE + (position % PAGE) * HD + (lane * (PAGE * HD))[:, None] + half[None, :]
        tl.store(place, rotated.to(pages.dtype.element_ty), mask=keep)
        tl.store(place + HD // 2, rotated2.to(pages.dtype.element_ty), mask=keep)


@jit
def append_kernel(
    fresh,
    past_len,
    query_len,
    slot_base,
    table,
    pages,
    KV: tl.constexpr,
    HD: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
):
    """Grid (blocks of S, 2·KV, B)."""
    start = tl.program_id(0) * BLOCK
    lane = tl.program_id(1)
    row = tl.program_id(2)
    num_queries = tl.load(query_len + row)
    if start >= num_queries:
        return
    offsets = start + tl.arange(0, BLOCK)
    kept = (offsets < num_queries) & (offsets >= num_queries - WIDTH * PAGE)
    positions = tl.load(past_len + row) + offsets
    table_row = table + (tl.load(slot_base) + row) * WIDTH
    page = tl.load(table_row + positions // PAGE % WIDTH, mask=kept, other=0).to(tl.int64)
    columns = tl.arange(0, HD)[None, :]
    source = fresh + (row * S + offsets).to(tl.int64)[:, None] * (2 * KV * HD) + lane * HD + columns
    to = pages + (page * PAGE_STRIDE + (positions % PAGE) * HD)[:, None] + lane * (PAGE * HD) + columns
    values = tl.load(source, mask=kept[:, None], other=0.0)
    tl.store(to, values.to(pages.dtype.element_ty), mask=kept[:, None])


def rope_append(
    qkv: Tensor,
    query_gamma: Tensor,
    key_gamma: Tensor,
    inverse_frequency: Tensor,
    rows: Rows,
    kv: LayerKv,
    query: Tensor,
    fresh: Tensor,
    *,
    epsilon: float,
    append: bool,
    heads_per_program: int | None = None,
) -> Launch:
    """Norm and rotate a layer's heads.

    Args:
        qkv: [M, (H + 2·KV)·hd] activations, or float32 [SPLIT, M, (H + 2·KV)·hd] to be added up in order. What lies at
            padding is not read.
        query_gamma: float32 [hd] 1 + weight of the query norm, times the scale of the scores.
        key_gamma: float32 [hd] 1 + weight of the key norm.
        inverse_frequency: float32 [hd / 2]
        rows: the step's rows.
        kv: where the keys and values go with ``append``.
        query: [M, H, hd] normed and rotated; 0 at padding.
        fresh: [M, 2·KV, hd] keys normed and rotated, then values; 0 at padding.
        epsilon: of both norms.
        append: also write the valid tokens to the slots' pages. Not before the attention of a chunk that may overwrite
            what its first tokens still see: rings, except for the few tokens of a decode step.
        heads_per_program: a power of two.
    """
    heads, total = query.shape[1], query.shape[1] + 2 * kv.kv_heads
    block = heads_per_program or (1 if rows.tokens < 256 else min(8, power_of_two(total)))
    return Launch(
        "rope.rope_append_kernel",
        (rows.tokens, cdiv(total, block), 1),
        (
            *(qkv, query_gamma, key_gamma, inverse_frequency, rows.past_len, rows.query_len, rows.slot_base),
            *(kv.table, kv.pages, query, fresh),
        ),
        {
            **kv.constants,
            "H": heads,
            "S": rows.positions,
            "TOKENS": rows.tokens,
            "SPLIT": qkv.shape[0] if len(qkv.shape) == 3 else 1,
            "EPS": epsilon,
            "HEADS": block,
            "APPEND": append,
        },
        num_warps=1 if block * kv.head_dim <= 512 else 4,
    )


def append(fresh: Tensor, rows: Rows, kv: LayerKv) -> Launch:
    """Write the valid tokens of ``fresh`` [M, 2·KV, hd] to the slots' pages; of a chunk longer than a ring, its end."""
    block = min(power_of_two(rows.positions), 32)
    return Launch(
        "rope.append_kernel",
        (cdiv(rows.positions, block), 2 * kv.kv_heads, rows.batch),
        (fresh, rows.past_len, rows.query_len, rows.slot_base, kv.table, kv.pages),
        {**kv.constants, "S": rows.positions, "BLOCK": block},
    )
