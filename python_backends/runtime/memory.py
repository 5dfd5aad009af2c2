"""How many KV slots of which length fit into a memory limit, and the buffers themselves."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from python_backends.errors import ConfigError
from python_backends.manifest import ModelShape

USUAL_SLOTS, USUAL_CONTEXT, SHORTEST_CONTEXT = 4, 8192, 512
SUM_ROWS = 128
"""ONNX Runtime's products on the CPU sum over a cache in pieces of so many rows. Window caches are moved by multiples
of it, so that a token's place within its piece never changes: what a prompt leaves in a slot is then the same bit for
bit however it was cut into chunks (`DecoderSpec.wants_even_chunks`)."""


@dataclass(frozen=True)
class SlotPlan:
    """Sizes of the KV caches."""

    num_slots: int
    context_length: int
    """Rows of a global layer's slot."""
    window_capacity: int
    """Rows of a local layer's slot: the window, and slack so that eviction moves it once in many steps."""
    num_bytes: int
    """Of all slots when full; the system gives pages only as slots fill."""


def window_rows(sliding_window: int) -> int:
    """Rows of a local layer's slot (`SlotPlan.window_capacity`)."""
    return sliding_window - 1 + max(1, sliding_window // 4 // SUM_ROWS) * SUM_ROWS


def plan_slots(model: ModelShape, num_slots: int, context_length: int, limit_bytes: int, item_size: int) -> SlotPlan:
    """The slots to make: those asked for, clipped to the model's context and to ``limit_bytes``.

    Where memory does not suffice, slots go first, down to 4; then the context, down to 8192 tokens; then the other
    slots, and the rest of the context down to 512. ``item_size`` is the bytes of one cache element.

    Raises:
        ConfigError: not even that fits.
    """
    window_capacity = window_rows(model.sliding_window)
    row = 2 * model.num_kv_heads * model.head_dim * item_size
    num_local = sum(kind == "local" for kind in model.layer_types)
    num_global = len(model.layer_types) - num_local
    windows = row * num_local * window_capacity

    def slot_bytes(length: int) -> int:
        return windows + row * num_global * length

    context_length = min(context_length, model.max_context_length)
    for fewest, shortest in ((USUAL_SLOTS, USUAL_CONTEXT), (1, SHORTEST_CONTEXT)):
        fitting = limit_bytes // slot_bytes(context_length)
        num_slots = min(num_slots, max(fitting, fewest))
        if num_slots > fitting and num_global:
            length = (limit_bytes // num_slots - windows) // (row * num_global)
            context_length = min(context_length, max(length, shortest))
    needed = num_slots * slot_bytes(context_length)
    if needed > limit_bytes:
        raise ConfigError(
            f"cpu_memory_gb leaves {limit_bytes / 1e9:.3g} GB for KV caches, and {num_slots} slot of {context_length} "
            f"tokens needs {needed / 1e9:.3g}; raise it"
        )
    return SlotPlan(num_slots, context_length, window_capacity, needed)


def lazy_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros of which only touched pages cost memory, aligned to a page, given back to the system when collected.

    A private anonymous mapping: `numpy.zeros` may clear memory that is resident already, and huge pages would make two
    megabytes resident for every head of every slot that holds a token.
    """
    count = math.prod(shape)
    size = max(1, count * np.dtype(dtype).itemsize)
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(buffer, dtype, count).reshape(shape)
