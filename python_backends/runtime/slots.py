"""KV caches as slots: one buffer per layer, one row per sequence, and what may be taken out, put back or taken back.

Local layers hold a window in the layout that ONNX Runtime documents for GroupQueryAttention's ``sliding_window_cache``:
after T tokens the first L(T) rows of a slot hold the L(T) newest tokens in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from python_backends.errors import InternalError
from python_backends.manifest import ModelShape
from python_backends.runtime.memory import SlotPlan, lazy_zeros


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
    """The buffers "key.i" and "value.i" [num_slots, kv_heads, capacity, head_dim] of every layer i."""

    def __init__(self, model: ModelShape, plan: SlotPlan, dtype: np.dtype[Any]) -> None:
        self._plan = plan
        self._window = model.sliding_window
        self.buffers: dict[str, NDArray[Any]] = {}
        self._local: dict[str, bool] = {}
        for layer, kind in enumerate(model.layer_types):
            capacity = plan.window_capacity if kind == "local" else plan.context_length
            shape = (plan.num_slots, model.num_kv_heads, capacity, model.head_dim)
            for part in ("key", "value"):
                self.buffers[f"{part}.{layer}"] = lazy_zeros(shape, dtype)
                self._local[f"{part}.{layer}"] = kind == "local"

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
        rows = {name: buffer[slot, :, : self._live(name, length)].copy() for name, buffer in self.buffers.items()}
        return SlotCopy(length, rows)

    def import_slot(self, slot: int, state: SlotCopy) -> None:
        """See `DecoderRuntime.import_slot`.

        Raises:
            InternalError: no such slot, or a state of other caches.
        """
        self._check(slot, state.length)
        targets = {name: buffer[slot, :, : self._live(name, state.length)] for name, buffer in self.buffers.items()}
        found = {name: (part.shape, part.dtype) for name, part in state.rows.items()}
        if found != {name: (part.shape, part.dtype) for name, part in targets.items()}:
            raise InternalError("a slot state of another model or of other cache sizes")
        for name, target in targets.items():
            target[...] = state.rows[name]

    def _live(self, name: str, length: int) -> int:
        return length - self.evicted(length) if self._local[name] else length

    def _check(self, slot: int, length: int) -> None:
        if not (0 <= slot < self._plan.num_slots and 0 <= length <= self._plan.context_length):
            raise InternalError(
                f"{length} tokens of slot {slot}; there are {self._plan.num_slots} slots "
                f"of {self._plan.context_length} tokens"
            )
