"""What every decoder runtime refuses before it touches a cache."""

from __future__ import annotations

from python_backends.errors import InternalError
from python_backends.runtime.base import DecoderSpec, StepInputs


def check_step(inputs: StepInputs, spec: DecoderSpec, *, takes_images: bool) -> None:
    """Check a step's sizes.

    Raises:
        InternalError: rows or tokens beyond the caches, images in a text-only model, or arrays of a wrong shape.
    """
    rows, length = inputs.input_ids.shape
    last = inputs.first_slot + rows
    if not (0 <= inputs.first_slot < last <= spec.num_slots):
        raise InternalError(f"slots {inputs.first_slot}…{last - 1} of {spec.num_slots}")
    if bool((inputs.query_len > length).any() or (inputs.query_len < 0).any() or (inputs.past_len < 0).any()):
        raise InternalError(f"query_len {inputs.query_len.tolist()} in a chunk of {length} tokens")
    if int((inputs.past_len + inputs.query_len).max()) > spec.max_context_length:
        raise InternalError(f"a step beyond the context of {spec.max_context_length} tokens")
    if inputs.image_index is not None and not takes_images:
        raise InternalError("image embeddings for a text-only decoder")
    if not 0 <= inputs.top_n <= spec.vocab_size:
        raise InternalError(f"top_n {inputs.top_n} of {spec.vocab_size} tokens")
    words = -(-spec.vocab_size // 32)
    if inputs.token_mask is not None and inputs.token_mask.shape != (*inputs.logit_positions.shape, words):
        raise InternalError(f"token_mask {list(inputs.token_mask.shape)}; wanted {words} words per position")
