"""A step taken apart into steps of one row, and what those gave joined again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from python_backends.runtime.base import StepInputs, StepOutputs

_BY_TOKEN = {"input_ids", "image_index", "image_group"}
_SHARED = {"first_slot", "top_n", "image_features", "attention_block"}


def single_row(inputs: StepInputs, row: int) -> StepInputs:
    """One row of a step, its chunk cut to its valid tokens."""
    part = slice(row, row + 1)
    length = max(1, int(inputs.query_len[row]))
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        if value is not None and field.name not in _SHARED:
            fields[field.name] = value[part, :length] if field.name in _BY_TOKEN else value[part]
    fields["first_slot"] = inputs.first_slot + row
    fields["logit_positions"] = np.minimum(inputs.logit_positions[part], length - 1)
    return dataclasses.replace(inputs, **fields)


def some_rows(inputs: StepInputs, part: slice) -> StepInputs:
    """Neighbouring rows of a step."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        if value is not None and field.name not in _SHARED:
            fields[field.name] = value[part]
    fields["first_slot"] = inputs.first_slot + part.start
    return dataclasses.replace(inputs, **fields)


def unpadded(inputs: StepInputs) -> list[tuple[slice, StepInputs]]:
    """The step taken apart into steps without padding and without idle rows, each with the rows that it is of.

    Rows of one token stay together where they are neighbours; a longer chunk goes alone.
    """
    active = [row for row, length in enumerate(inputs.query_len) if length > 0]
    if inputs.input_ids.shape[1] > 1:
        return [(slice(row, row + 1), single_row(inputs, row)) for row in active]
    parts: list[slice] = []
    for row in active:
        start = parts.pop().start if parts and parts[-1].stop == row else row
        parts.append(slice(start, row + 1))
    return [(part, some_rows(inputs, part)) for part in parts]


def spread_rows(parts: Sequence[tuple[slice, StepOutputs]], into: StepOutputs) -> StepOutputs:
    """The outputs of `unpadded` steps, put where they belong in those of the whole step."""
    for part, outputs in parts:
        for field in dataclasses.fields(StepOutputs):
            whole, values = getattr(into, field.name), getattr(outputs, field.name)
            if whole is not None:
                whole[part, : values.shape[1]] = values
    return into


def join_rows(rows: Sequence[StepOutputs]) -> StepOutputs:
    """The rows' outputs as those of one step."""
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(StepOutputs):
        parts = [getattr(row, field.name) for row in rows]
        if field.name == "block_attention" and parts[0] is not None:
            parts = _widened(parts)
        joined[field.name] = None if parts[0] is None else np.concatenate(parts)
    return StepOutputs(**joined)


def _widened(masses: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Rows of unequal numbers of blocks, zeros behind the shorter ones."""
    width = max(part.shape[1] for part in masses)
    return [np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in masses]
