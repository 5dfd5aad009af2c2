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
GROUPS_AT_ONCE = 2048
"""Coded one after the other in pieces that stay in the processor's cache from one operation to the next."""
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
        if dtype not in ("float32", "float16"):
            raise ConfigError(f"a KV cache of {dtype} cannot be kept as int{bits}; set its precision to as-is")
        self._dtype: np.dtype[Any] = np.dtype(dtype)

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
        ends, integers = self._parts(np.frombuffer(into, np.uint8), self._groups(given.nbytes))
        for first in range(0, len(ends), GROUPS_AT_ONCE):
            part = slice(first, first + GROUPS_AT_ONCE)
            self._encode(given[GROUP * first : GROUP * part.stop], ends[part], integers[part])

    def _encode(self, given: NDArray[Any], ends: NDArray[np.float16], integers: NDArray[np.uint8]) -> None:
        values = np.zeros((len(ends), GROUP), np.float32)
        values.reshape(-1)[: given.size] = _widened(given) if self._dtype == np.float16 else given
        across = np.ascontiguousarray(values.T)  # along groups of 32 numpy compares one by one
        least, greatest = across.min(0), across.max(0)
        if min(least.min(), -greatest.max()) < -_LARGEST:
            for array in (values, least, greatest):
                np.clip(array, -_LARGEST, _LARGEST, out=array)
        # The ends as they are stored, outwards where they had to be rounded: no value is below 0 or above all levels.
        ends[:, 0] = _rounded_down(least)
        least = ends[:, 0].astype(np.float32)
        ends[:, 1] = -_rounded_down((least - greatest) / (2**self.bits - 1))
        step = ends[:, 1].astype(np.float32)
        values -= least[:, None]
        values *= (1 / np.where(step > 0, step, np.float32(1)))[:, None]
        values += np.float32(0.5)
        numbers = values.astype(np.uint8)
        if self.bits == 4:
            pairs = numbers.view(np.uint16)  # the first in the low byte
            numbers = (pairs | pairs >> 4).astype(np.uint8)
        integers[...] = numbers

    def decode(self, stored: memoryview, into: memoryview) -> None:
        """See `Codec`."""
        room = np.frombuffer(into, self._dtype)
        ends, integers = self._parts(np.frombuffer(stored, np.uint8), self._groups(room.nbytes))
        for first in range(0, len(ends), GROUPS_AT_ONCE):
            part = slice(first, first + GROUPS_AT_ONCE)
            target = room[GROUP * first : GROUP * part.stop]
            found = self._decoded(ends[part].astype(np.float32), integers[part]).reshape(-1)[: target.size]
            target[...] = _narrowed(found) if self._dtype == np.float16 else found

    def _decoded(self, ends: NDArray[np.float32], integers: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self.bits == 4:
            pairs = integers.astype(np.uint16)
            integers = ((pairs | pairs << 4) & 0x0F0F).view(np.uint8)
        values = integers.astype(np.float32)
        values *= ends[:, 1:]
        values += ends[:, :1]
        return values

    def _parts(self, stored: NDArray[np.uint8], count: int) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
        """[groups, 2] ends and [groups, bytes] integers, as they lie in the stored bytes."""
        return stored[: 4 * count].view(np.float16).reshape(count, 2), stored[4 * count :].reshape(count, -1)


def _rounded_down(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """The largest float16 that is not above; within what float16 can hold."""
    near = values.astype(np.float16)
    bits = near.view(np.int16)
    # The next one below: a smaller number of the positive ones, a larger of the negative ones.
    bits += np.where(bits < 0, np.int16(1), np.int16(-1)) * (near.astype(np.float32) > values)
    return near


# numpy converts float16 one by one, three times as slowly as these do with whole vectors of integers.


def _widened(values: NDArray[np.float16]) -> NDArray[np.float32]:
    """Finite values in float32."""
    bits = values.view(np.uint16).astype(np.uint32)
    signs = (bits & np.uint32(0x8000)) << np.uint32(16)
    bits &= 0x7FFF
    bits <<= 13
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)  # the exponents' biases are that far apart
    bits |= signs
    return wide


def _narrowed(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """The nearest float16, the one further from zero between two; what is too large is the largest. In place."""
    bits = values.view(np.uint32)
    signs = (bits >> np.uint32(16)) & np.uint32(0x8000)
    bits &= 0x7FFFFFFF
    values *= np.float32(2.0**-112)
    bits += 0x1000
    bits >>= 13
    np.minimum(bits, 0x7BFF, out=bits)
    bits |= signs
    return bits.astype(np.uint16).view(np.float16)


def make_codec(precision: str, dtype: str) -> Codec | None:
    """The codec of a precision of the configuration for elements of ``dtype``; None: payloads as they are.

    Raises ConfigError where the elements are neither float32 nor float16.
    """
    return None if precision == "as-is" else GroupCodec(int(precision.removeprefix("int")), dtype)
