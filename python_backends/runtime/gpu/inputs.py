"""The small arrays of one step, packed so that they reach the device in one copy.

Steps are padded to buckets, so that a step of any size replays one of a few recordings. Every element has four bytes;
fields start at multiples of 64 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from python_backends.runtime.base import StepInputs
from python_backends.runtime.gpu.launch import Tensor

DECODE_POSITIONS = 8
"""Most positions of a row that the decode kernels take: the next token and drafts."""
_FIELD_WORDS = 16
SMALLEST_CHUNK = 64
"""Positions that a shorter chunk of a prompt is padded to."""


@dataclass(frozen=True)
class Bucket:
    """What a recording depends on, so what steps that share one have in common."""

    rows: int
    positions: int
    """Of a row, padded."""
    wanted: int
    """Positions of a row whose logits are wanted, padded."""
    images: bool = False
    """Whether the chunk holds image tokens."""
    random: bool = False
    """Whether a row draws instead of taking the largest."""
    adjustments: int = 0
    """Adjusted ids of a row, padded."""
    masked: bool = False
    """Whether a grammar's mask is there."""
    top_n: int = 0
    """Most likely tokens that are reported, padded."""
    mass: bool = False
    """Whether the attention mass of KV pages is wanted."""

    @property
    def tokens(self) -> int:
        """Padded tokens."""
        return self.rows * self.positions

    @property
    def logit_rows(self) -> int:
        """Padded rows of logits."""
        return self.rows * self.wanted

    @property
    def body(self) -> Bucket:
        """What the layers depend on."""
        return Bucket(self.rows, self.positions, 1, images=self.images, mass=self.mass)

    @property
    def is_decode(self) -> bool:
        """Whether the decode kernels take it."""
        return self.positions <= DECODE_POSITIONS


def bucket_of(inputs: StepInputs) -> Bucket:
    """The smallest bucket that a step fits into."""
    rows, positions = inputs.input_ids.shape
    adjusted = 0 if inputs.adjust_ids is None else inputs.adjust_ids.shape[1]
    return Bucket(
        rows=_power(rows),
        positions=_power(positions) if positions <= DECODE_POSITIONS else max(SMALLEST_CHUNK, _power(positions)),
        wanted=_power(inputs.logit_positions.shape[1]),
        images=inputs.image_index is not None and bool((inputs.image_index >= 0).any()),
        random=bool((inputs.temperature > 0).any()),
        adjustments=_power(adjusted) if adjusted else 0,
        masked=inputs.token_mask is not None,
        top_n=_power(inputs.top_n) if inputs.top_n else 0,
        mass=inputs.attention_block > 0,
    )


def _power(count: int) -> int:
    """The smallest power of two from ``count`` on."""
    return 1 << max(0, count - 1).bit_length()


@dataclass(frozen=True)
class Field:
    """One array of a step."""

    offset: int
    """In words."""
    dtype: str
    shape: tuple[int, ...]
    padding: int | float
    """What padding holds."""

    @property
    def size(self) -> int:
        """Words."""
        return int(np.prod(self.shape))


class StepLayout:
    """Where each array of a bucket's steps lies: first what the layers read, then what the head does.

    The first part depends on `Bucket.body` alone, so all buckets with one body share a recording of the layers.
    """

    def __init__(self, bucket: Bucket, mask_words: int) -> None:
        """``mask_words`` of a grammar's mask per position."""
        b, s, r = bucket.rows, bucket.positions, bucket.wanted
        self.fields: dict[str, Field] = {}
        self.num_words = 0
        self._add("slot_base", "i32", (1,), 0)
        self._add("past_len", "i32", (b,), 0)
        self._add("query_len", "i32", (b,), 0)
        self._add("input_ids", "i32", (b, s), 0)
        if bucket.images:
            self._add("image_index", "i32", (b, s), -1)
            self._add("image_group", "i32", (b, s), -1)
        self._add("logit_positions", "i32", (b, r), 0)
        self._add("targets", "i32", (b, r), -1)
        if bucket.random:
            self._add("temperature", "fp32", (b,), 0.0)
            self._add("top_k", "i32", (b,), 0)
            self._add("top_p", "fp32", (b,), 1.0)
            self._add("min_p", "fp32", (b,), 0.0)
            self._add("uniform", "fp32", (b, r), 0.5)
        if bucket.adjustments:
            self._add("adjust_ids", "i32", (b, bucket.adjustments), -1)
            self._add("adjust_factor", "fp32", (b, bucket.adjustments), 1.0)
            self._add("adjust_bias", "fp32", (b, bucket.adjustments), 0.0)
        if bucket.masked:
            self._add("token_mask", "i32", (b, r, mask_words), -1)

    def _add(self, name: str, dtype: str, shape: tuple[int, ...], padding: int | float) -> None:
        field = Field(self.num_words, dtype, shape, padding)
        self.fields[name] = field
        self.num_words += -(-field.size // _FIELD_WORDS) * _FIELD_WORDS

    def pack(self, inputs: StepInputs) -> NDArray[np.int32]:
        """The words of a step."""
        words = np.zeros(self.num_words, np.int32)
        for name, field in self.fields.items():
            part = words[field.offset : field.offset + field.size].view(_numpy(field.dtype)).reshape(field.shape)
            part[...] = field.padding
            value = np.array([inputs.first_slot]) if name == "slot_base" else getattr(inputs, name)
            if value is not None:
                part[tuple(slice(size) for size in value.shape)] = value
        return words

    def tensors(self, base: Tensor) -> dict[str, Tensor]:
        """The arrays on the device, in the words at ``base``."""
        return {
            name: Tensor(base.address + 4 * field.offset, field.dtype, field.shape)
            for name, field in self.fields.items()
        }


def _numpy(dtype: str) -> type[Any]:
    return np.float32 if dtype == "fp32" else np.int32
