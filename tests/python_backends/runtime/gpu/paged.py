"""Random KV in shuffled pages, and attention over it as one would write it down, in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from python_backends.runtime.gpu.interpreter import InterpreterDevice, host_view
from python_backends.runtime.gpu.kernels.paging import LayerKv, Rows
from python_backends.runtime.gpu.launch import DTYPES, Tensor

PAGE = 64
Array = NDArray[Any]


def upload(device: InterpreterDevice, dtype: str, values: Array) -> Tensor:
    tensor = device.allocate(dtype, *values.shape)
    device.write(tensor, values.astype(DTYPES[dtype]))
    return tensor


@dataclass
class Case:
    """A step over slots whose past lies in pages."""

    device: InterpreterDevice
    past_len: list[int]
    query_len: list[int]
    positions: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    dtype: str = "fp32"
    kv_dtype: str = ""
    first_slot: int = 1
    seed: int = 0
    lookahead: int = 8

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.kv_dtype = self.kv_dtype or self.dtype
        batch = len(self.past_len)
        longest = max(past + query for past, query in zip(self.past_len, self.query_len, strict=True))
        whole = -(-max(longest, 1) // PAGE)
        self.width = -(-(self.window + self.lookahead) // PAGE) + 1 if self.window else whole + 1
        slots = self.first_slot + batch
        order = self.random.permutation(slots * self.width) + 1
        self.table = order.reshape(slots, self.width).astype(np.int32)
        shape = (int(order.max()) + 1, 3, 2, self.kv_heads, PAGE, self.head_dim)
        # Allocated memory reads as NaN, also where no token was ever written.
        self.pool = self.device.allocate(self.kv_dtype, *shape)
        self.kv = LayerKv(self.pool, upload(self.device, "i32", self.table), 1, self.window)
        integers = [
            upload(self.device, "i32", np.array(values))
            for values in (self.past_len, self.query_len, [self.first_slot])
        ]
        self.rows = Rows(*integers, self.positions)
        self._total = longest

    @functools.cached_property
    def query(self) -> Array:
        """[B, S, H, hd] scaled."""
        values = self.random.standard_normal((len(self.past_len), self.positions, self.heads, self.head_dim))
        values *= 2 * self.head_dim**-0.5
        return values.astype(DTYPES[self.dtype]).astype(np.float64)

    @functools.cached_property
    def keys(self) -> Array:
        """[B, tokens, KV, hd] of past and chunk."""
        return self._tokens()

    @functools.cached_property
    def values(self) -> Array:
        """[B, tokens, KV, hd] of past and chunk."""
        return self._tokens()

    def _tokens(self) -> Array:
        """Numbers that the pages' type and the activations' both hold."""
        shape = (len(self.past_len), self._total, self.kv_heads, self.head_dim)
        values = self.random.standard_normal(shape).astype(DTYPES[self.kv_dtype])
        return values.astype(DTYPES[self.dtype]).astype(np.float64)

    def place(self, row: int, position: int) -> tuple[int, int]:
        """(page, row within) of a token."""
        return int(self.table[self.first_slot + row, position // PAGE % self.width]), position % PAGE

    def fill(self, *, with_chunk: bool) -> None:
        """Write the past, and the chunk's valid tokens, in the order in which they came."""
        pool = host_view(self.pool)
        for row, (past, query) in enumerate(zip(self.past_len, self.query_len, strict=True)):
            for position in range(past + (query if with_chunk else 0)):
                page, inside = self.place(row, position)
                pool[page, 1, 0, :, inside] = self.keys[row, position].astype(pool.dtype)
                pool[page, 1, 1, :, inside] = self.values[row, position].astype(pool.dtype)

    def packed_query(self, *, poison: bool = True) -> Tensor:
        """[M, H, hd] on the device, NaN at padding."""
        query = self.query.copy()
        if poison:
            for row, count in enumerate(self.query_len):
                query[row, count:] = np.nan
        return upload(self.device, self.dtype, query.reshape(-1, self.heads, self.head_dim))

    def packed_fresh(self) -> Tensor:
        """[M, 2·KV, hd] on the device, NaN at padding."""
        fresh = np.full((len(self.past_len), self.positions, 2 * self.kv_heads, self.head_dim), np.nan)
        for row, (past, query) in enumerate(zip(self.past_len, self.query_len, strict=True)):
            fresh[row, :query, : self.kv_heads] = self.keys[row, past : past + query]
            fresh[row, :query, self.kv_heads :] = self.values[row, past : past + query]
        return upload(self.device, self.dtype, fresh.reshape(-1, 2 * self.kv_heads, self.head_dim))

    def scores(self, row: int, offset: int, groups: Array | None = None) -> Array:
        """[H, keys] −inf where not seen."""
        past, length = self.past_len[row], self.past_len[row] + self.query_len[row]
        at = past + offset
        keys = np.repeat(self.keys[row, :length], self.heads // self.kv_heads, axis=1)
        scores = np.einsum("hd,thd->ht", self.query[row, offset], keys)
        positions = np.arange(length)
        seen = positions <= at
        if groups is not None and groups[row, offset] >= 0:
            seen[past:] |= groups[row, : length - past] == groups[row, offset]
        if self.window:
            seen &= positions > at - self.window
        return np.where(seen, scores, -np.inf)

    def expected(self, groups: Array | None = None) -> Array:
        """[B, S, H·hd], NaN at padding."""
        result = np.full((len(self.past_len), self.positions, self.heads, self.head_dim), np.nan)
        for row, count in enumerate(self.query_len):
            for offset in range(count):
                shares = softmax(self.scores(row, offset, groups))
                length = shares.shape[1]
                values = np.repeat(self.values[row, :length], self.heads // self.kv_heads, axis=1)
                result[row, offset] = np.einsum("ht,thd->hd", shares, values)
        return result.reshape(len(self.past_len), self.positions, -1)

    def masses(self, row: int, block: int, blocks: int) -> Array:
        """[blocks] of the row's last query."""
        shares = softmax(self.scores(row, self.query_len[row] - 1)).mean(0)
        padded = np.zeros(blocks * block)
        padded[: len(shares)] = shares
        return padded.reshape(blocks, block).sum(1)

    def check(self, output: Tensor, tolerance: float, groups: Array | None = None) -> None:
        """Valid positions are right, padding is finite."""
        found = self.device.read(output).astype(np.float64).reshape(len(self.past_len), self.positions, -1)
        wanted = self.expected(groups)
        assert np.isfinite(found).all()
        valid = ~np.isnan(wanted)
        assert found[valid] == pytest.approx(wanted[valid], abs=tolerance, rel=tolerance)


def softmax(scores: Array) -> Array:
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    result: Array = shares / shares.sum(-1, keepdims=True)
    return result
