"""KV caches as slots: one buffer per layer, one row per sequence, and what may be taken out, put back or taken back.

What is taken out is a whole slot, or blocks and tails (`KvLayout`). In the bytes of a block or tail the layers follow
each other, keys before values, each [kv_heads, tokens, head_dim]; in a tail the global layers come first.

Local layers hold a window in the layout that ONNX Runtime documents for GroupQueryAttention's ``sliding_window_cache``:
after T tokens the first L(T) rows of a slot hold the L(T) newest tokens in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from python_backends.errors import InternalError
from python_backends.manifest import ModelShape
from python_backends.runtime.base import KvLayout
from python_backends.runtime.memory import SlotPlan, lazy_zeros

LAYOUT_VERSION = 1
"""Raised whenever the bytes of a block or a tail change their meaning."""
DEFAULT_BLOCK_TOKENS = 64


@dataclass(frozen=True)
class SlotCopy:
    """`SlotState` of one sequence: the live rows of every layer."""

    length: int
    """Tokens."""
    rows: dict[str, NDArray[Any]]
    """By cache name: [kv_heads, live rows, head_dim]."""

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return sum(part.nbytes for part in self.rows.values())


class SlotCaches:
    """The buffers "key.i" and "value.i" [num_slots, kv_heads, capacity, head_dim] of every layer i, in host memory.

    Where else they lie, `_make`, `place`, `_read`, `_write` and `_finish` are other ones (`device_slots`).
    """

    def __init__(
        self, model: ModelShape, plan: SlotPlan, dtype: np.dtype[Any], block_tokens: int = DEFAULT_BLOCK_TOKENS
    ) -> None:
        self._plan = plan
        self._window = model.sliding_window
        self._row = model.num_kv_heads, model.head_dim
        self.dtype = dtype
        self.layout = _layout(model, dtype, block_tokens)
        self.buffers: dict[str, NDArray[Any]] = {}
        self._local: dict[str, bool] = {}
        for layer, kind in enumerate(model.layer_types):
            capacity = plan.window_capacity if kind == "local" else plan.context_length
            shape = (plan.num_slots, model.num_kv_heads, capacity, model.head_dim)
            for part in ("key", "value"):
                self._make(f"{part}.{layer}", shape)
                self._local[f"{part}.{layer}"] = kind == "local"

    @property
    def names(self) -> Iterable[str]:
        """Of the caches."""
        return self._local

    def place(self, name: str, first_slot: int, slots: int) -> tuple[tuple[int, ...], int]:
        """(shape, address) of some slots of a cache."""
        part = self.buffers[name][first_slot : first_slot + slots]
        return part.shape, part.ctypes.data

    def close(self) -> None:
        """Free the caches."""
        self.buffers.clear()

    def _make(self, name: str, shape: tuple[int, ...]) -> None:
        self.buffers[name] = lazy_zeros(shape, self.dtype)

    def _read(self, name: str, slot: int, start: int, into: NDArray[Any]) -> None:
        """Copy rows from ``start`` on out, as many as ``into`` [kv_heads, rows, head_dim] has."""
        into[...] = self.buffers[name][slot, :, start : start + into.shape[1]]

    def _write(self, name: str, slot: int, start: int, values: NDArray[Any]) -> None:
        """Copy rows in."""
        self.buffers[name][slot, :, start : start + values.shape[1]] = values

    def _finish(self) -> None:
        """Called when all copies of a call were started."""

    def evicted(self, length: int) -> int:
        """Tokens that a local layer no longer holds after ``length`` of them: length − L(length)."""
        capacity = self._plan.window_capacity
        stride = capacity - self._window + 1
        return max(0, -(-(length - capacity) // stride)) * stride

    def max_draft(self, past_len: int, wanted: int) -> int:
        """See `DecoderRuntime.max_draft`.

        Dropping tokens leaves the buffers as they are, so the shorter sequence must have evicted as many tokens as the
        longer one did.
        """
        kept = past_len + 1
        fits = self._plan.context_length
        if any(self._local.values()):
            fits = min(fits, self._plan.window_capacity + self.evicted(kept))
        return max(0, min(wanted, fits - kept))

    def export_slot(self, slot: int, length: int) -> SlotCopy:
        """See `DecoderRuntime.export_slot`.

        Raises:
            InternalError: no such slot, or more tokens than one holds.
        """
        self._check(slot, length)
        rows = {name: np.empty(self._shape(self._live(name, length)), self.dtype) for name in self.names}
        for name, into in rows.items():
            self._read(name, slot, 0, into)
        self._finish()
        return SlotCopy(length, rows)

    def import_slot(self, slot: int, state: SlotCopy) -> None:
        """See `DecoderRuntime.import_slot`.

        Raises:
            InternalError: no such slot, or a state of other caches.
        """
        self._check(slot, state.length)
        found = {name: (part.shape, part.dtype) for name, part in state.rows.items()}
        if found != {name: (self._shape(self._live(name, state.length)), self.dtype) for name in self.names}:
            raise InternalError("a slot state of another model or of other cache sizes")
        for name, rows in state.rows.items():
            self._write(name, slot, 0, rows)
        self._finish()

    def export_block(self, slot: int, start: int, into: memoryview) -> None:
        """See `DecoderRuntime.export_block`.

        Raises:
            InternalError: no such slot or block, or a buffer of another size.
        """
        size = self.layout.block_tokens
        self._check(slot, start + size)
        _check_bytes(into, self.layout.block_bytes)
        if start % size:
            raise InternalError(f"a block does not start at token {start}")
        parts = self._parts(into)
        for name in self._of_kind(local=False):
            self._read(name, slot, start, parts.take(size))
        self._finish()

    def export_tail(self, slot: int, length: int, into: memoryview) -> None:
        """See `DecoderRuntime.export_tail`.

        Raises:
            InternalError: no such slot, more tokens than one holds, or a buffer of another size.
        """
        self._check(slot, length)
        _check_bytes(into, self.layout.tail_bytes(length))
        parts = self._parts(into)
        partial, resident = length % self.layout.block_tokens, length - self.evicted(length)
        for name in self._of_kind(local=False):
            self._read(name, slot, length - partial, parts.take(partial))
        for name in self._of_kind(local=True):
            seen = min(length, self._window)
            self._read(name, slot, resident - seen, parts.take(seen))
        self._finish()

    def import_blocks(
        self,
        slot: int,
        blocks: Sequence[memoryview],
        tail: memoryview,
        length: int,
        *,
        keep: int | None = None,
        computed: int = 0,
    ) -> None:
        """See `DecoderRuntime.import_blocks`.

        Raises:
            InternalError: no such slot, buffers that do not add up to ``length`` tokens, or a ``keep`` the tail cannot
                serve. The slot's tokens are undefined then.
        """
        size, kept = self.layout.block_tokens, length if keep is None else keep
        first = self.layout.first_block(len(blocks), length, kept, computed)
        self._check(slot, length)
        _check_bytes(tail, self.layout.tail_bytes(length))
        for index, block in enumerate(blocks, first):
            _check_bytes(block, self.layout.block_bytes)
            parts = self._parts(block)
            for name in self._of_kind(local=False):
                self._write(name, slot, index * size, parts.take(size))
        parts = self._parts(tail)
        for name in self._of_kind(local=False):
            self._write(name, slot, length - length % size, parts.take(length % size))
        for name in self._of_kind(local=True):
            self._import_window(name, slot, parts.take(min(length, self._window)), length, kept)
        self._finish()

    def _import_window(self, name: str, slot: int, window: NDArray[Any], length: int, kept: int) -> None:
        """Put the newest tokens where ``kept`` computed ones would have left them.

        The rows before hold tokens that no later query sees, but the operator multiplies them by a probability of zero:
        they must be finite.
        """
        seen = window.shape[1] - (length - kept)
        end = kept - self.evicted(kept)
        self._write(name, slot, 0, np.zeros(self._shape(end - seen), self.dtype))
        self._write(name, slot, end - seen, window[:, :seen])

    def _of_kind(self, *, local: bool) -> Iterator[str]:
        return (name for name, is_local in self._local.items() if is_local == local)

    def _shape(self, rows: int) -> tuple[int, int, int]:
        heads, size = self._row
        return heads, rows, size

    def _parts(self, payload: memoryview) -> _Parts:
        return _Parts(payload, self._row, self.dtype)

    def _live(self, name: str, length: int) -> int:
        return length - self.evicted(length) if self._local[name] else length

    def _check(self, slot: int, length: int) -> None:
        if not (0 <= slot < self._plan.num_slots and 0 <= length <= self._plan.context_length):
            raise InternalError(
                f"{length} tokens of slot {slot}; there are {self._plan.num_slots} slots "
                f"of {self._plan.context_length} tokens"
            )


class _Parts:
    """Cuts the bytes of a block or a tail into the arrays that they are a sequence of."""

    def __init__(self, payload: memoryview, row: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self._payload = payload
        self._row, self._dtype = row, dtype
        self._offset = 0

    def take(self, tokens: int) -> NDArray[Any]:
        """The next one, [kv_heads, tokens, head_dim]."""
        heads, size = self._row
        count = heads * tokens * size
        part = np.frombuffer(self._payload, self._dtype, count, self._offset)
        self._offset += part.nbytes
        return part.reshape(heads, tokens, size)


def _check_bytes(payload: memoryview, wanted: int) -> None:
    if payload.nbytes != wanted:
        raise InternalError(f"a buffer of {payload.nbytes} bytes; this block or tail has {wanted}")


def _layout(model: ModelShape, dtype: np.dtype[Any], block_tokens: int) -> KvLayout:
    row = 2 * model.num_kv_heads * model.head_dim * dtype.itemsize
    num_local = sum(kind == "local" for kind in model.layer_types)
    sizes = (model.layer_types, model.num_kv_heads, model.head_dim, model.sliding_window, dtype.name, block_tokens)
    digest = hashlib.sha256(repr(sizes).encode()).hexdigest()
    return KvLayout(
        identity=f"slots-{LAYOUT_VERSION}-{digest}",
        dtype=dtype.name,
        block_tokens=block_tokens,
        window=model.sliding_window,
        global_bytes=row * (len(model.layer_types) - num_local),
        local_bytes=row * num_local,
    )
