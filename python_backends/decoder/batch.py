"""A scheduler's step and the sequences in it → the arrays of one run of the runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from python_backends.decoder.scheduler import Row, Step
from python_backends.decoder.sequence import ActiveSequence
from python_backends.runtime.base import DecoderSpec, StepInputs, idle_inputs

Sequences = Mapping[int, ActiveSequence]


MaxDraft = Callable[[int, int], int]
"""`DecoderRuntime.max_draft`."""


def make_inputs(
    step: Step, sequences: Sequences, spec: DecoderSpec, masks: NDArray[np.int32] | None, max_draft: MaxDraft
) -> StepInputs:
    """The arrays of a step: row b is slot ``first slot + b``; a slot in between that is not in the step is idle.

    Args:
        step: rows in rising slot order.
        sequences: by id.
        spec: of the runtime.
        masks: [slots, R, words] token masks, or None where no sequence of the step has a grammar.
        max_draft: of the runtime.
    """
    first = step.rows[0].slot
    size = step.rows[-1].slot - first + 1
    chunks = {row.slot - first: _tokens(row, sequences[row.sequence_id]) for row in step.rows}
    is_even = spec.wants_even_chunks if step.kind == "prefill" else spec.wants_even_steps
    fills = {
        row.slot - first: filler(len(chunks[row.slot - first]), row.start + len(chunks[row.slot - first]), max_draft)
        for row in step.rows
        if is_even
    }
    width = max(len(chunk) + fills.get(index, 0) for index, chunk in chunks.items())
    if step.kind == "decode" and is_even:
        width = max(2, width)  # a row that cannot be filled up is the same beside any others
    wanted = max(_wanted(row, sequences[row.sequence_id]) for row in step.rows)
    inputs = idle_inputs(first, size, width, wanted)
    for row in step.rows:
        index = row.slot - first
        sequence, chunk = sequences[row.sequence_id], chunks[index]
        inputs.input_ids[index, : len(chunk)] = chunk
        inputs.past_len[index] = row.start
        inputs.query_len[index] = len(chunk) + fills.get(index, 0)
        # The last positions of the chunk, the one that draws the next token behind them all.
        inputs.logit_positions[index] = np.maximum(np.arange(len(chunk) - wanted, len(chunk)), 0)
        if row.samples:
            _fill_sampling(inputs, index, row.start + len(chunk), sequence)
        _fill_images(inputs, index, row, sequence, spec.tokens_per_image)
        inputs.top_n = max(inputs.top_n, _top_n(sequence))
    if masks is not None:
        inputs.token_mask = masks[first : first + size, :wanted]
    _fill_adjustments(inputs, step.rows, sequences)
    _fill_targets(inputs, step.rows, sequences)
    return inputs


def filler(count: int, end: int, max_draft: MaxDraft) -> int:
    """Tokens to put behind a chunk of ``count`` tokens that ends at position ``end``: it is even then.

    They are dropped as a rejected draft is. So whatever a prompt is cut into, and wherever the cache lets it resume,
    every token is computed by the same kernels, and what it leaves is the same bit for bit; but for an odd chunk whose
    end is the last token before a window cache evicts (one position in 128), where nothing can be dropped.
    """
    return min(count % 2, max_draft(end - 1, 1))


def _tokens(row: Row, sequence: ActiveSequence) -> list[int]:
    """The row's chunk: tokens of the sequence, and behind the last of them its draft."""
    chunk = sequence.tokens[row.start : row.start + row.count]
    return chunk + sequence.draft if row.samples else chunk


def _wanted(row: Row, sequence: ActiveSequence) -> int:
    if sequence.request.parameters.prompt_logprobs is not None and row.start < sequence.prompt_length:
        return row.count
    return 1 + len(sequence.draft) if row.samples else 1


def _top_n(sequence: ActiveSequence) -> int:
    parameters = sequence.request.parameters
    return max(parameters.logprobs or 0, parameters.prompt_logprobs or 0)


def _fill_sampling(inputs: StepInputs, index: int, end: int, sequence: ActiveSequence) -> None:
    parameters = sequence.request.parameters
    if parameters.greedy:
        return
    inputs.temperature[index] = parameters.temperature
    inputs.top_k[index] = max(0, parameters.top_k)
    inputs.top_p[index] = parameters.top_p
    inputs.min_p[index] = parameters.min_p
    wanted = inputs.uniform.shape[1]
    for column in range(max(0, wanted - 1 - len(sequence.draft)), wanted):
        # Keyed by seed and position alone: neither the batch nor a draft changes what is drawn.
        position = end - (wanted - 1 - column)
        generator = np.random.Generator(np.random.Philox(key=sequence.seed, counter=position))
        inputs.uniform[index, column] = generator.random()


def _fill_adjustments(inputs: StepInputs, rows: Sequence[Row], sequences: Sequences) -> None:
    lists = {row.slot: sequences[row.sequence_id].adjustments for row in rows if row.samples}
    longest = max((len(each) for each in lists.values() if each is not None), default=0)
    if not longest:
        return
    # Rounded up, so that few shapes occur.
    shape = len(inputs.past_len), 16 * (-(-longest // 16))
    inputs.adjust_ids = np.full(shape, -1, np.int32)
    inputs.adjust_factor = np.ones(shape, np.float32)
    inputs.adjust_bias = np.zeros(shape, np.float32)
    for slot, each in lists.items():
        if each is not None:
            index = slot - inputs.first_slot
            each.write(inputs.adjust_ids[index], inputs.adjust_factor[index], inputs.adjust_bias[index])


def _fill_targets(inputs: StepInputs, rows: Sequence[Row], sequences: Sequences) -> None:
    for row in rows:
        sequence = sequences[row.sequence_id]
        if sequence.request.parameters.prompt_logprobs is None or row.start >= sequence.prompt_length:
            continue
        if inputs.targets is None:
            inputs.targets = np.full(inputs.logit_positions.shape, -1, np.int32)
        following = sequence.tokens[row.start + 1 : row.start + row.count + 1]
        inputs.targets[row.slot - inputs.first_slot, : len(following)] = following


def _fill_images(inputs: StepInputs, index: int, row: Row, sequence: ActiveSequence, size: int) -> None:
    request = sequence.request
    end = row.start + row.count
    inside = [number for number, start in enumerate(request.image_starts) if row.start <= start < end]
    if not inside:
        return
    assert request.image_features is not None
    first = inside[0] - request.encoded_from
    inputs.image_features = request.image_features[first * size : (first + len(inside)) * size]
    inputs.image_index = np.full_like(inputs.input_ids, -1)
    inputs.image_group = np.full_like(inputs.input_ids, -1)
    for order, number in enumerate(inside):
        start = request.image_starts[number] - row.start
        inputs.image_index[index, start : start + size] = np.arange(order * size, (order + 1) * size)
        inputs.image_group[index, start : start + size] = order
