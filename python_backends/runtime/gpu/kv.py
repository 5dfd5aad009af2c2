"""The paged KV of a decoder: pools on the device, tables beside them, and blocks, tails and slots going out and in.

A page of a group of layers is one piece of memory, ``[layers, 2, kv_heads, 64, head_dim]``, so a block of the KV tiers
is a few whole pages and leaves the device in as many copies. A tail is made of parts of pages: token ranges of every
head, one strided copy a page.

Copies go on beside the steps. What a step would disturb, or needs, it waits for on the device (`PagedKv.begin_step`):
blocks stay as they are until the slot begins anew, a tail's window until a ring has gone round.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from python_backends.errors import ConfigError, InternalError
from python_backends.manifest import ModelShape
from python_backends.runtime.base import KvLayout, SlotState, Transfer
from python_backends.runtime.gpu.launch import DTYPES, Copy, Device, Piece, Tensor
from python_backends.runtime.gpu.pages import PAGE_TOKENS, PageTable, ring_pages, ring_table

LAYOUT_VERSION = 1
"""Raised whenever the bytes of a block or a tail change their meaning."""
LOOKAHEAD = 8
"""Tokens of a decode step: the next one and drafts."""
SHORTEST_CONTEXT = 512
UNBOUNDED = 2**31


@dataclass(frozen=True)
class KvSizes:
    """Sizes of the pools."""

    num_slots: int
    context_length: int
    """Tokens of one slot, a multiple of a page."""
    num_global: int
    """Layers that see everything."""
    num_local: int
    ring: int
    """Pages of a local layer's ring."""
    page_row_bytes: int
    """Of one layer's page."""

    @property
    def global_pages(self) -> int:
        """Pages of the global layers' pool, the one that is nobody's included."""
        return self.num_slots * (self.context_length // PAGE_TOKENS) + 1

    @property
    def num_bytes(self) -> int:
        """Of both pools."""
        return self.page_row_bytes * (
            self.num_global * self.global_pages + self.num_local * max(1, self.num_slots * self.ring)
        )


def plan_kv(model: ModelShape, num_slots: int, context_length: int, limit_bytes: int, dtype: str) -> KvSizes:
    """The pools to make: those asked for, clipped to ``limit_bytes``; slots go first, then the context.

    Raises:
        ConfigError: not even one slot of 512 tokens fits.
    """
    num_local = sum(kind == "local" for kind in model.layer_types)
    row = 2 * model.num_kv_heads * PAGE_TOKENS * model.head_dim * DTYPES[dtype].itemsize
    context = -(-min(context_length, model.max_context_length) // PAGE_TOKENS) * PAGE_TOKENS

    def sized(slots: int, length: int) -> KvSizes:
        ring = ring_pages(model.sliding_window, LOOKAHEAD)
        return KvSizes(slots, length, len(model.layer_types) - num_local, num_local, ring, row)

    for fewest, shortest in ((4, 8192), (1, SHORTEST_CONTEXT)):
        while num_slots > fewest and sized(num_slots, context).num_bytes > limit_bytes:
            num_slots -= 1
        while context > shortest and sized(num_slots, context).num_bytes > limit_bytes:
            context -= PAGE_TOKENS
    sizes = sized(num_slots, context)
    if sizes.num_bytes > limit_bytes:
        raise ConfigError(
            f"gpu_memory_gb leaves {limit_bytes / 1e9:.3g} GB for KV, and one slot of {context} tokens needs "
            f"{sizes.num_bytes / 1e9:.3g}; raise it, or build a smaller --precision"
        )
    return sizes


@dataclass(frozen=True)
class PagedState:
    """`SlotState` of one sequence: its blocks and its tail in host memory."""

    length: int
    payload: NDArray[np.uint8]
    identity: str

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return self.payload.nbytes


@dataclass(frozen=True, eq=False)
class _SlotCopy:
    """A copy of a slot's KV, out or in."""

    transfer: Transfer
    until: int
    """Tokens that the slot may grow to meanwhile; 0: the slot is being filled."""


class PagedKv:
    """Pools, tables and their copies. Not thread-safe."""

    def __init__(self, device: Device, model: ModelShape, sizes: KvSizes, dtype: str, block_tokens: int) -> None:
        if block_tokens % PAGE_TOKENS:
            raise ConfigError(f"kv_block_tokens is {block_tokens}; on a GPU it must be a multiple of {PAGE_TOKENS}")
        self._device, self._sizes = device, sizes
        self._item = DTYPES[dtype].itemsize
        self._row = model.head_dim * self._item
        self._heads = 2 * model.num_kv_heads
        self.layout = _layout(model, dtype, block_tokens, sizes)
        shape = (2, model.num_kv_heads, PAGE_TOKENS, model.head_dim)
        self.global_pool = device.allocate(dtype, sizes.global_pages, sizes.num_global, *shape)
        self.local_pool = device.allocate(dtype, max(1, sizes.num_slots * sizes.ring), max(1, sizes.num_local), *shape)
        self.pages = PageTable(sizes.num_slots, sizes.context_length // PAGE_TOKENS, sizes.global_pages)
        self.ring = ring_table(sizes.num_slots, sizes.ring)
        self._copies: defaultdict[int, deque[_SlotCopy]] = defaultdict(deque)
        """By slot, those that may not be over."""
        self.global_table = device.allocate("i32", *self.pages.table.shape)
        self.local_table = device.allocate("i32", *self.ring.shape)
        device.write(self.global_table, self.pages.table)
        device.write(self.local_table, self.ring)
        for pool in (self.global_pool, self.local_pool):
            device.fill_zero(pool)  # a masked key is multiplied by a probability of zero: it must be finite

    def reserve(self, lengths: Sequence[tuple[int, int]]) -> None:
        """Give each (slot, tokens) its pages and tell the device where tables changed.

        Raises:
            InternalError: a longer slot than there can be.
        """
        for slot, length in lengths:
            if self.pages.grow(slot, length):
                self._write_row(slot)

    def release(self, slot: int) -> None:
        """Take back every page of a slot whose sequence starts anew."""
        if self.pages.shrink(slot, 0):
            self._write_row(slot)

    def _write_row(self, slot: int) -> None:
        width = self.pages.table.shape[1]
        self._device.write(self.global_table.view(slot * width, width), self.pages.table[slot])

    # --- what leaves and enters -------------------------------------------------------------------------------

    def block(self, slot: int, start: int) -> list[Piece]:
        """Where the block of tokens from ``start`` on lies.

        Raises:
            InternalError: no such block.
        """
        size = self.layout.block_tokens
        self._check(slot, start + size)
        if start % size:
            raise InternalError(f"a block does not start at token {start}")
        return list(self._globals(slot, start, start + size))

    def tail(self, slot: int, length: int, keep: int | None = None) -> list[Piece]:
        """Where the tail at ``length`` lies, the partial block of the global layers first.

        With ``keep`` one less than ``length`` the newest token has no place: pages are the same.

        Raises:
            InternalError: more tokens than a slot holds.
        """
        self._check(slot, length)
        size = self.layout.block_tokens
        pieces = list(self._globals(slot, length - length % size, length))
        if self._sizes.num_local:
            pieces += self._locals(slot, max(0, length - self.layout.window), length)
        return pieces

    def export_block(self, slot: int, start: int, into: memoryview) -> Transfer:
        """Start to copy a block out; tokens may be appended meanwhile.

        Raises:
            InternalError: as `block`, or a buffer of another size.
        """
        return self._export(slot, self.block(slot, start), into, UNBOUNDED)

    def export_tail(self, slot: int, length: int, into: memoryview) -> Transfer:
        """Start to copy a tail out; tokens may be appended meanwhile until a ring would reach its window.

        Raises:
            InternalError: as `tail`, or a buffer of another size.
        """
        return self._export(slot, self.tail(slot, length), into, self._kept_until(length))

    def import_blocks(
        self, slot: int, blocks: Sequence[memoryview], tail: memoryview, length: int, first: int = 0
    ) -> Transfer:
        """Start to fill a slot with ``length`` tokens, from block ``first`` on; its pages are reserved here.

        Raises:
            InternalError: as `tail`, or a buffer of another size.
        """
        size = self.layout.block_tokens
        self._check(slot, length)
        self.reserve([(slot, length)])
        copies: list[Copy] = [(self.block(slot, index * size), block) for index, block in enumerate(blocks, first)]
        return self._import(slot, [*copies, (self.tail(slot, length), tail)])

    def export_slot(self, slot: int, length: int) -> PagedState:
        """Everything of ``length`` tokens, in host memory."""
        payload = np.empty(self._slot_bytes(length), np.uint8)
        self._device.copy_out([(self._whole(slot, length), payload.data)], self._fills(slot)).wait()
        return PagedState(length, payload, self.layout.identity)

    def import_slot(self, slot: int, state: SlotState) -> None:
        """Put it back, into any slot.

        Raises:
            InternalError: a state of other caches.
        """
        if not isinstance(state, PagedState) or state.identity != self.layout.identity:
            raise InternalError(f"a slot state of another runtime: {type(state).__name__}")
        self.reserve([(slot, state.length)])
        self._import(slot, [(self._whole(slot, state.length), state.payload.data)])

    def begin_step(self, slot: int, start: int, stop: int) -> None:
        """Before a step appends the tokens ``start … stop − 1`` to a slot, or begins anew there (``start`` 0): it waits
        on the device for the copies that it would disturb, or that fill the slot."""
        copies = self._begun(slot)
        for copy in [each for each in copies if start == 0 or stop > each.until]:
            self._device.wait_for(copy.transfer)
            copies.remove(copy)

    def _begun(self, slot: int) -> deque[_SlotCopy]:
        """A slot's copies, without the oldest that are over."""
        copies = self._copies[slot]
        while copies and copies[0].transfer.done():
            copies.popleft()
        return copies

    def _export(self, slot: int, pieces: Sequence[Piece], into: memoryview, until: int) -> Transfer:
        _check_bytes(into, pieces)
        transfer = self._device.copy_out([(pieces, into)], self._fills(slot))
        self._copies[slot].append(_SlotCopy(transfer, until))
        return transfer

    def _import(self, slot: int, copies: Sequence[Copy]) -> Transfer:
        for pieces, payload in copies:
            _check_bytes(payload, pieces)
        transfer = self._device.copy_in(copies, [copy.transfer for copy in self._begun(slot)])
        self._copies[slot].append(_SlotCopy(transfer, 0))
        return transfer

    def _fills(self, slot: int) -> list[Transfer]:
        """Copies into a slot that may not be over."""
        return [copy.transfer for copy in self._begun(slot) if copy.until == 0]

    def _kept_until(self, length: int) -> int:
        """Tokens that a slot may grow to before a page of the window behind ``length`` tokens is written again."""
        if not self._sizes.num_local:
            return UNBOUNDED
        return (max(0, length - self.layout.window) // PAGE_TOKENS + self._sizes.ring) * PAGE_TOKENS

    def _whole(self, slot: int, length: int) -> list[Piece]:
        full = length - length % self.layout.block_tokens
        self._check(slot, length)
        return [*self._globals(slot, 0, full), *self.tail(slot, length)]

    def _slot_bytes(self, length: int) -> int:
        return length // self.layout.block_tokens * self.layout.block_bytes + self.layout.tail_bytes(length)

    def _globals(self, slot: int, start: int, stop: int) -> Iterator[Piece]:
        return self._pieces(self.global_pool, self._sizes.num_global, self.pages.table[slot], start, stop)

    def _locals(self, slot: int, start: int, stop: int) -> Iterator[Piece]:
        return self._pieces(self.local_pool, self._sizes.num_local, self.ring[slot], start, stop)

    def _pieces(self, pool: Tensor, layers: int, table: NDArray[np.int32], start: int, stop: int) -> Iterator[Piece]:
        """The tokens ``start … stop − 1`` page by page."""
        page_bytes = layers * self._sizes.page_row_bytes
        while start < stop:
            index, first = divmod(start, PAGE_TOKENS)
            count = min(PAGE_TOKENS - first, stop - start)
            address = pool.address + int(table[index % len(table)]) * page_bytes
            if count == PAGE_TOKENS:
                yield Piece(address, page_bytes, page_bytes, 1)
            else:
                pitch = PAGE_TOKENS * self._row
                yield Piece(address + first * self._row, count * self._row, pitch, layers * self._heads)
            start += count

    def _check(self, slot: int, length: int) -> None:
        if not (0 <= slot < self._sizes.num_slots and 0 <= length <= self._sizes.context_length):
            raise InternalError(
                f"{length} tokens of slot {slot}; there are {self._sizes.num_slots} slots "
                f"of {self._sizes.context_length} tokens"
            )


def _check_bytes(payload: memoryview, pieces: Sequence[Piece]) -> None:
    wanted = sum(piece.num_bytes for piece in pieces)
    if payload.nbytes != wanted:
        raise InternalError(f"a buffer of {payload.nbytes} bytes; this block or tail has {wanted}")


def _layout(model: ModelShape, dtype: str, block_tokens: int, sizes: KvSizes) -> KvLayout:
    row = sizes.page_row_bytes // PAGE_TOKENS
    numbers = (model.layer_types, model.num_kv_heads, model.head_dim, model.sliding_window, dtype, block_tokens)
    digest = hashlib.sha256(repr(numbers).encode()).hexdigest()
    return KvLayout(
        identity=f"pages-{LAYOUT_VERSION}-{digest}",
        dtype=DTYPES[dtype].name,
        block_tokens=block_tokens,
        window=model.sliding_window,
        global_bytes=row * sizes.num_global,
        local_bytes=row * sizes.num_local,
    )
