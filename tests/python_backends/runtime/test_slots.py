"""Slots taken out and put back, and drafts taken back: later logits are those of plain decoding."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.quantize import Precision
from python_backends.errors import InternalError
from python_backends.runtime.onnxruntime import OnnxRuntimeDecoder
from tests.checkpoints import FIRST_TEXT, IMAGE, tiny
from tests.driver import FP32, decoder, step_inputs

TEXT = np.random.default_rng(3).integers(FIRST_TEXT, IMAGE, 330).tolist()
"""The sequence that every test computes a part of."""
SLOTS, CONTEXT = 3, 330


@pytest.fixture(scope="module", params=["1b", "4b"])
def plain(request):
    """A runtime, and the logits [330, V] of decoding `TEXT` one token after the other in slot 0."""
    runtime = decoder(tiny(request.param), num_slots=SLOTS, context=CONTEXT)
    return runtime, np.concatenate([append(runtime, 0, past, 1) for past in range(len(TEXT))])


def append(runtime: OnnxRuntimeDecoder, slot: int, past: int, count: int, ids: list[int] | None = None) -> np.ndarray:
    """Logits [count, V] of the next tokens of `TEXT`, or of others."""
    chunk = TEXT[past : past + count] if ids is None else ids
    return runtime.step(step_inputs(slot, [chunk], [past]), want_logits=True).logits[0]


def evicted(runtime: OnnxRuntimeDecoder, length: int) -> int:
    """T − L(T), the operator's documentation written as a loop: a full cache makes room for one stride."""
    window, gone = runtime._model.sliding_window, 0
    capacity = runtime._slots.buffers["key.0"].shape[2]
    for now in range(length + 1):
        if now - gone > capacity:
            gone += capacity - window + 1
    return gone


@settings(max_examples=40, deadline=None)
@given(
    at=st.integers(0, len(TEXT) - 6),
    chunk=st.sampled_from([5, 17, 400]),
    slots=st.tuples(st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1)),
    between=st.integers(0, 300),
)
def test_a_sequence_set_aside_anywhere_continues_bit_for_bit_in_any_slot(plain, at, chunk, slots, between):
    runtime, _ = plain
    first, second = slots
    for past in range(0, at, chunk):
        append(runtime, first, past, min(chunk, at - past))
    state = runtime.export_slot(first, at)
    wanted = [append(runtime, first, at + offset, 1) for offset in range(5)]
    for slot in {first, second}:
        append(runtime, slot, 0, 0, TEXT[::-1][: between + 1])  # another sequence takes the slot
    runtime.import_slot(second, state)
    found = [append(runtime, second, at + offset, 1) for offset in range(5)]
    np.testing.assert_array_equal(found, wanted)
    runtime.import_slot(first, state)  # the copy has not changed
    np.testing.assert_array_equal(append(runtime, first, at, 1), wanted[0])


@pytest.mark.parametrize("precision", [Precision("fp16"), Precision("int4", 16)], ids=str)
def test_setting_aside_keeps_float16_caches_bit_for_bit(precision):
    runtime = decoder(tiny("4b"), precision, num_slots=2, context=CONTEXT)
    append(runtime, 1, 0, 77)
    state = runtime.export_slot(1, 77)
    wanted = append(runtime, 1, 77, 3)
    runtime.import_slot(0, state)
    np.testing.assert_array_equal(append(runtime, 0, 77, 3), wanted)


def test_a_state_holds_the_live_rows_and_no_more(plain):
    runtime, _ = plain
    model = runtime._model
    for length in (0, 1, 8, 24, 25, 135, 136, 160, 330):
        append(runtime, 1, 0, 0, (TEXT + TEXT)[:length] or [5])
        state = runtime.export_slot(1, length)
        assert state.length == length
        rows = sum(length - evicted(runtime, length) * (kind == "local") for kind in model.layer_types)
        assert state.num_bytes == rows * 2 * model.num_kv_heads * model.head_dim * 4
    before = state.rows["key.0"].copy()
    append(runtime, 1, 0, 100)
    np.testing.assert_array_equal(state.rows["key.0"], before)


@settings(max_examples=40, deadline=None)
@given(
    past=st.integers(1, len(TEXT) - 12),
    wanted=st.integers(0, 10),
    accepted=st.integers(0, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_after_rejected_drafts_logits_are_those_of_plain_decoding(plain, past, wanted, accepted, seed):
    runtime, plainly = plain
    largest = np.abs(plainly).max()
    append(runtime, 2, 0, past)
    count = runtime.max_draft(past, wanted)
    assert 0 <= count <= wanted
    accepted = min(accepted, count)
    wrong = np.random.default_rng(seed).integers(FIRST_TEXT, IMAGE, count - accepted).tolist()
    checked = append(runtime, 2, past, 0, TEXT[past : past + 1 + accepted] + wrong)
    np.testing.assert_allclose(
        checked[: 1 + accepted], plainly[past : past + 1 + accepted], rtol=0, atol=1e-5 * largest
    )
    # Far enough for the window's next eviction.
    start, end = past + 1 + accepted, min(len(TEXT), past + 140)
    cuts = sorted({start, min(start + 1, end), min(start + 4, end), end})
    for position, stop in itertools.pairwise(cuts):
        found = append(runtime, 2, position, stop - position)
        np.testing.assert_allclose(found, plainly[position:stop], rtol=0, atol=1e-5 * largest)


def test_drafts_end_where_the_next_eviction_would(plain):
    runtime, _ = plain
    for past in range(CONTEXT):
        longest = runtime.max_draft(past, 1000)
        assert past + 1 + longest <= CONTEXT
        assert evicted(runtime, past + 1 + longest) == evicted(runtime, past + 1)
        if past + 1 + longest < CONTEXT:
            assert evicted(runtime, past + 2 + longest) > evicted(runtime, past + 1)
        assert [runtime.max_draft(past, wanted) for wanted in (0, 2)] == [0, min(2, longest)]
    assert runtime.max_draft(CONTEXT, 5) == 0


def test_one_draft_beyond_the_bound_would_be_noticed(plain):
    # Guards the property above: the bound is not idle.
    runtime, plainly = plain
    past = next(past for past in range(60, CONTEXT) if runtime.max_draft(past, 10) == 0)
    for buffer in runtime._slots.buffers.values():
        buffer[2] = 1.0  # what an earlier run left there may be just what is missing
    append(runtime, 2, 0, past)
    append(runtime, 2, past, 0, [TEXT[past], 9])
    found = append(runtime, 2, past + 1, 1)
    assert np.abs(found[0] - plainly[past + 1]).max() > 1e-3 * np.abs(plainly).max()


def test_slots_and_states_that_do_not_fit_are_refused(plain):
    runtime, _ = plain
    append(runtime, 0, 0, 30)
    state = runtime.export_slot(0, 30)
    for slot, length in ((-1, 3), (SLOTS, 3), (0, CONTEXT + 1), (0, -1)):
        with pytest.raises(InternalError):
            runtime.export_slot(slot, length)
    for slot, changed in (
        (SLOTS, state),
        (0, dataclasses.replace(state, length=31)),
        (0, dataclasses.replace(state, rows={})),
        (0, object()),
    ):
        with pytest.raises(InternalError):
            runtime.import_slot(slot, changed)
    other = decoder(tiny("270m"), FP32)
    with pytest.raises(InternalError, match="another model"):
        other.import_slot(0, state)
