"""KV caches as slots in a device's memory: what leaves a slot or enters it is a strided copy for each layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from python_backends.manifest import ModelShape
from python_backends.runtime.base import Transfer
from python_backends.runtime.gpu.launch import DTYPES, Device, Piece, Tensor
from python_backends.runtime.memory import SlotPlan
from python_backends.runtime.slots import DEFAULT_BLOCK_TOKENS, SlotCaches

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DeviceSlots(SlotCaches):
    """`SlotCaches` on a device, which is closed with them. Steps and copies must not overlap.

    Raises:
        ConfigError: the device has no room.
    """

    def __init__(
        self,
        device: Device,
        model: ModelShape,
        plan: SlotPlan,
        dtype: np.dtype[Any],
        block_tokens: int = DEFAULT_BLOCK_TOKENS,
    ) -> None:
        self._device = device
        self._tensors: dict[str, Tensor] = {}
        self._begun: list[Transfer] = []
        """They keep the host memory that is copied until it has been."""
        device.activate()
        super().__init__(model, plan, dtype, block_tokens)
        self._finish()

    def place(self, name: str, first_slot: int, slots: int) -> tuple[tuple[int, ...], int]:
        """See `SlotCaches.place`."""
        tensor = self._tensors[name]
        shape = (slots, *tensor.shape[1:])
        return shape, tensor.view(first_slot * (tensor.size // tensor.shape[0]), *shape).address

    def close(self) -> None:
        """See `SlotCaches.close`."""
        self._tensors.clear()
        self._device.close()

    def _make(self, name: str, shape: tuple[int, ...]) -> None:
        tensor = self._device.allocate(_NAMES[self.dtype], *shape)
        self._device.fill_zero(tensor)  # a masked key is multiplied by a probability of zero: it must be finite
        self._tensors[name] = tensor

    def _read(self, name: str, slot: int, start: int, into: NDArray[Any]) -> None:
        if into.size:
            self._device.activate()
            self._begun.append(self._device.copy_out([([self._piece(name, slot, start, into.shape[1])], _bytes(into))]))

    def _write(self, name: str, slot: int, start: int, values: NDArray[Any]) -> None:
        if values.size:
            held = np.ascontiguousarray(values)
            self._device.activate()
            self._begun.append(
                self._device.copy_in([([self._piece(name, slot, start, values.shape[1])], _bytes(held))])
            )

    def _finish(self) -> None:
        self._device.synchronize()
        self._begun.clear()

    def _piece(self, name: str, slot: int, start: int, rows: int) -> Piece:
        """Rows of every head."""
        tensor = self._tensors[name]
        _, heads, capacity, size = tensor.shape
        row = size * self.dtype.itemsize
        address = tensor.address + (slot * heads * capacity + start) * row
        return Piece(address, rows * row, capacity * row, heads)


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
