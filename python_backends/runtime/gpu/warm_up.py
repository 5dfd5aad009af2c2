"""Before the first request: kernels are compiled, several at once, and the usual steps are recorded.

What remains for later is what few requests ask for, such as the likeliest tokens of a prompt; its kernels are compiled
when it is first asked for, and kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from python_backends.runtime.base import StepInputs, idle_inputs
from python_backends.runtime.gpu.decoder import GpuDecoder
from python_backends.runtime.gpu.inputs import DECODE_POSITIONS, SMALLEST_CHUNK, bucket_of
from python_backends.runtime.gpu.launch import Launch

Compile = Callable[[list[Launch]], object]


def warm_up(decoder: GpuDecoder, compile_all: Compile, *, chunk: int, attention_block: int) -> int:
    """Compile and record.

    Args:
        decoder: with empty slots.
        compile_all: compiles launches' kernels.
        chunk: most tokens of a prefill step.
        attention_block: tokens of the blocks whose attention masses are wanted; 0 where none are.

    Returns:
        How many recordings there are.
    """
    steps = list(_usual_steps(decoder, chunk, attention_block))
    compile_all(decoder.launches({bucket_of(step) for step in steps}))
    for step in steps:
        decoder.step(step)
    return len(decoder.recordings)


def _usual_steps(decoder: GpuDecoder, chunk: int, attention_block: int) -> Iterator[StepInputs]:
    spec = decoder.spec
    masses = sorted({0, attention_block})
    rows = [1 << power for power in range((spec.num_slots - 1).bit_length() + 1)]
    drafts = [1 << power for power in range((DECODE_POSITIONS - 1).bit_length() + 1)]
    for mass, random, count, width in itertools.product(masses, (False, True), rows, drafts):
        yield _idle(min(count, spec.num_slots), width, wanted=width, mass=mass, random=random)
    chunks = [1 << power for power in range(SMALLEST_CHUNK.bit_length() - 1, (chunk - 1).bit_length() + 1)]
    images = (False, True) if spec.image_token_id is not None else (False,)
    for mass, random, width, has_image in itertools.product(masses, (False, True), chunks, images):
        if width <= spec.max_context_length and (not has_image or width >= spec.tokens_per_image):
            yield _idle(1, width, wanted=1, mass=mass, random=random, hidden_size=has_image * spec.hidden_size)


def _idle(rows: int, width: int, *, wanted: int, mass: int, random: bool, hidden_size: int = 0) -> StepInputs:
    """A step of idle rows: it runs every kernel and changes nothing."""
    inputs = idle_inputs(0, rows, width, wanted)
    inputs.attention_block = mass
    inputs.temperature[:] = random
    if hidden_size:
        inputs.image_features = np.zeros((1, hidden_size), np.float32)
        inputs.image_index = np.full((rows, width), -1, np.int32)
        inputs.image_index[0, 0] = 0
        inputs.image_group = np.full((rows, width), -1, np.int32)
    return inputs
