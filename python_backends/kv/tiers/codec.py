"""What a slower tier stores in place of a payload: fewer bits an element, where the operator accepts what that does.

A codec's name goes into the fingerprint of everything that is kept, so nothing is ever read with another one.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from python_backends.errors import ConfigError

GROUP = 32
"""Elements with a scale of their own; lies within one head of one token in every Gemma 3."""
_LARGEST = float(np.finfo(np.float16).max)


class Codec(Protocol):
    """Turns payloads into what is stored and back."""

    @property
    def name(self) -> str:
        """Changes whenever what is stored would."""
        ...

    def stored_bytes(self, num_bytes: int) -> int:
        """Size of what is stored for a payload of ``num_bytes``."""
        ...

    def encode(self, payload: memoryview, into: memoryview) -> None:
        """Fill ``into`` (``stored_bytes``)."""
        ...

    def decode(self, stored: memoryview, into: memoryview) -> None:
        """Fill ``into`` (``num_bytes``)."""
        ...


class GroupCodec:
    """Each group of elements as integers of ``bits`` between its least and its greatest value, both float16.

    Stored: [groups, 2] float16 (least value, step), then the integers, two in a byte where they have four bits.

    Args:
        bits: 8 or 4.
        dtype: of the payload's elements, float32 or float16.
    """

    def __init__(self, bits: int, dtype: str) -> None:
        self.bits = bits
        self._dtype: np.dtype[Any] = np.dtype(dtype)
        if self._dtype.kind != "f":
            raise ConfigError(f"a KV cache of {dtype} cannot be kept as int{bits}; set its precision to as-is")

    @property
    def name(self) -> str:
        """See `Codec`."""
        return f"int{self.bits}-{GROUP}-{self._dtype.name}"

    def _groups(self, num_bytes: int) -> int:
        return -(-num_bytes // self._dtype.itemsize // GROUP)

    def stored_bytes(self, num_bytes: int) -> int:
        """See `Codec`."""
        return self._groups(num_bytes) * (4 + GROUP * self.bits // 8)

    def encode(self, payload: memoryview, into: memoryview) -> None:
        """See `Codec`."""
        given = np.frombuffer(payload, self._dtype)
        values = np.zeros((self._groups(given.nbytes), GROUP), np.float32)
        values.reshape(-1)[: given.size] = given
        levels = 2**self.bits - 1
        least = values.min(1).clip(-_LARGEST, _LARGEST).astype(np.float16)
        step = ((values.max(1) - least) / levels).clip(0, _LARGEST).astype(np.float16)
        # The step as it is stored, so that rounding it costs nothing more than its own error.
        divisor = np.where(step > 0, step, np.float16(1)).astype(np.float32)
        numbers = np.rint((values - least[:, None].astype(np.float32)) / divisor[:, None]).clip(0, levels)
        ends, integers = self._parts(np.frombuffer(into, np.uint8), len(values))
        ends[:, 0], ends[:, 1] = least, step
        found = numbers.astype(np.uint8)
        integers[...] = found if self.bits == 8 else found[:, ::2] | found[:, 1::2] << 4

    def decode(self, stored: memoryview, into: memoryview) -> None:
        """See `Codec`."""
        room = np.frombuffer(into, self._dtype)
        count = self._groups(room.nbytes)
        ends, integers = self._parts(np.frombuffer(stored, np.uint8), count)
        values = np.empty((count, GROUP), np.float32)
        if self.bits == 8:
            values[...] = integers
        else:
            values[:, ::2], values[:, 1::2] = integers & 15, integers >> 4
        values *= ends[:, 1:].astype(np.float32)
        values += ends[:, :1].astype(np.float32)
        room[...] = values.reshape(-1)[: room.size]

    def _parts(self, stored: NDArray[np.uint8], count: int) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """[groups, 2] ends and [groups, bytes] integers, as they lie in the stored bytes."""
        return stored[: 4 * count].view(np.float16).reshape(count, 2), stored[4 * count :].reshape(count, -1)


def make_codec(precision: str, dtype: str) -> Codec | None:
    """The codec of a precision of the configuration for elements of ``dtype``; None: payloads as they are.

    Raises ConfigError where the elements are no floating-point numbers.
    """
    return None if precision == "as-is" else GroupCodec(int(precision.removeprefix("int")), dtype)
