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
def page_rows(
    table_row, start, end, tokens, PAGE: tl.constexpr, WIDTH: tl.constexpr, PAGE_STRIDE: tl.constexpr, HD: tl.constexpr
):
    """Where the rows of ``tokens`` = start + 0 … BLOCK−1 begin, in elements, in head 0 of the keys: int64 [BLOCK].

    A block starts at a multiple of its size, which is a page, a part of one, or two. Behind ``end`` there may be no
    page: such rows lie in the block's first one and mean nothing.
    """
    BLOCK: tl.constexpr = tokens.shape[0]
    page = page_number(table_row, start // PAGE, WIDTH)
    if BLOCK > PAGE:
        tl.static_assert(BLOCK == 2 * PAGE, "a block is at most two pages")
        second = page_number(table_row, tl.where(start + PAGE < end, start // PAGE + 1, start // PAGE), WIDTH)
        rows = tl.where(tokens < start + PAGE, page, second) * PAGE_STRIDE
    else:
        rows = page * PAGE_STRIDE
    return rows + (tokens % PAGE) * HD
