"""What kernels need to know of a step's rows and of one layer's KV pages, and how they find a page.

Shapes: B rows, S positions of a row (right-padded), M = B·S tokens, H query heads, KV key heads, G = H / KV, hd
head size.
"""

from __future__ import annotations

from dataclasses import dataclass

from python_backends.runtime.gpu.kernels.lang import jit, tl
from python_backends.runtime.gpu.launch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of a step, on the device."""

    past_len: Tensor
    """int32 [B] tokens in the row's slot before this step."""
    query_len: Tensor
    """int32 [B] valid tokens of the row, 0 where idle."""
    slot_base: Tensor
    """int32 [1] slot of row 0; row b is slot ``slot_base + b``."""
    positions: int
    """S."""

    @property
    def batch(self) -> int:
        """B."""
        return self.past_len.size

    @property
    def tokens(self) -> int:
        """M."""
        return self.batch * self.positions


@dataclass(frozen=True)
class LayerKv:
    """One layer's part of the pages of its group."""

    pool: Tensor
    """[pages, layers, 2, KV, page tokens, hd]"""
    table: Tensor
    """int32 [slots, width]: position p of slot s lies in page ``table[s, p // page tokens % width]``."""
    layer: int
    """Index within the group."""
    window: int = 0
    """Tokens that a query sees, its own included; 0 where it sees everything before it."""

    @property
    def kv_heads(self) -> int:
        """KV."""
        return self.pool.shape[3]

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return self.pool.shape[4]

    @property
    def head_dim(self) -> int:
        """hd."""
        return self.pool.shape[5]

    @property
    def pages(self) -> Tensor:
        """The pool from this layer's part of page 0 on."""
        page_layer = 2 * self.kv_heads * self.page_tokens * self.head_dim
        return self.pool.view(self.layer * page_layer, self.pool.size - self.layer * page_layer)

    @property
    def constants(self) -> dict[str, int]:
        """Of every kernel that reads or writes pages."""
        return {
            "KV": self.kv_heads,
            "HD": self.head_dim,
            "PAGE": self.page_tokens,
            "WIDTH": self.table.shape[1],
            "PAGE_STRIDE": self.pool.size // self.pool.shape[0],
        }


@jit
def page_number(table_row, index, WIDTH: tl.constexpr):
    """The page of the tokens ``PAGE·index …`` of a slot. 64 bits: a pool has more than 2³¹ elements."""
    return tl.load(table_row + index % WIDTH).to(tl.int64)


@jit
def tile_pages(table_row, tile, end, BLOCK: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr):
    """(page of a tile's first token, page of its last one) for tiles of BLOCK tokens: a page, a part of one, or two.

    Behind token ``end`` there may be no page; the first one stands in. Loops load these one tile ahead and carry them
    along: a load whose address another load of the same iteration gives is not fetched ahead far enough.
    """
    first = page_number(table_row, tile * BLOCK // PAGE, WIDTH)
    second = first
    if BLOCK > PAGE:
        tl.static_assert(BLOCK == 2 * PAGE, "a tile is at most two pages")
        index = tile * BLOCK // PAGE
        second = page_number(table_row, tl.where(index * PAGE + PAGE < end, index + 1, index), WIDTH)
    return first, second


@jit
def tile_rows(
    first, second, tile, BLOCK: tl.constexpr, PAGE: tl.constexpr, PAGE_STRIDE: tl.constexpr, HD: tl.constexpr
):
    """Where the tokens of a tile begin in head 0 of the keys, in elements: int64 [BLOCK]."""
    tokens = tl.arange(0, BLOCK)
    if BLOCK > PAGE:
        rows = tl.where(tokens < PAGE, first, second) * PAGE_STRIDE + (tokens % PAGE) * HD
    else:
        rows = (first * PAGE_STRIDE + (tile % (PAGE // BLOCK)) * (BLOCK * HD)) + tokens * HD
    return rows


@jit
def widened(values, dtype: tl.constexpr):
    """Keys or values of a page as the type of a product. Cards of capability 8.9 convert 8 bits to float16 alone."""
    if values.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        result = values.to(tl.float16).to(tl.float32).to(dtype)
    else:
        result = values.to(dtype)
    return result
