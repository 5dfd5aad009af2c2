"""Blocks and tails taken out of slots and put back: what follows is, bit for bit, what comes without."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.quantize import Precision
from python_backends.errors import InternalError
from python_backends.runtime.onnxruntime import OnnxRuntimeDecoder
from tests.checkpoints import FAMILIES, FIRST_TEXT, IMAGE, tiny
from tests.driver import FP32, Driver, decoder, step_inputs, vision
from tests.prompts import prompt

TEXT = np.random.default_rng(5).integers(FIRST_TEXT, IMAGE, 400).tolist()
SLOTS, CONTEXT, BLOCK = 3, 440, 16


def opened(family: str, precision: Precision = FP32) -> OnnxRuntimeDecoder:
    runtime = decoder(tiny(family), precision, num_slots=SLOTS, context=CONTEXT, block_tokens=BLOCK)
    for buffer in runtime._slots.buffers.values():
        buffer[...] = 3.0  # what earlier sequences left must never matter
    return runtime


@pytest.fixture(scope="module", params=["1b", "4b", "12b"])
def runtime(request):
    return opened(request.param)


def append(runtime: OnnxRuntimeDecoder, slot: int, past: int, count: int, ids: list[int] | None = None) -> np.ndarray:
    chunk = TEXT[past : past + count] if ids is None else ids
    return runtime.step(step_inputs(slot, [chunk], [past]), want_logits=True).logits[0]


def exported(runtime: OnnxRuntimeDecoder, slot: int, length: int) -> tuple[list[memoryview], memoryview]:
    """The full blocks and the tail of ``length`` tokens."""
    layout = runtime.kv_layout
    blocks = [memoryview(bytearray(layout.block_bytes)) for _ in range(length // BLOCK)]
    for index, block in enumerate(blocks):
        runtime.export_block(slot, index * BLOCK, block)
    tail = memoryview(bytearray(layout.tail_bytes(length)))
    runtime.export_tail(slot, length, tail)
    return blocks, tail


@settings(max_examples=12, deadline=None)
@given(
    at=st.integers(1, len(TEXT) - 30),
    chunk=st.sampled_from([9, 50, 440]),
    slots=st.tuples(st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1)),
    drop=st.booleans(),
    share=st.sampled_from([0, 0.3, 1]),
)
def test_a_sequence_continues_bit_for_bit_from_its_blocks_and_tail_in_any_slot(runtime, at, chunk, slots, drop, share):
    """With a ``share`` of its chunks computed in that slot and only the rest put behind them."""
    first, second = slots
    kept = at - drop
    for past in range(0, kept, chunk):
        append(runtime, first, past, min(chunk, kept - past))
    wanted = [append(runtime, first, kept + offset, 1) for offset in range(30)]
    # The same chunks again up to ``at``: with ``drop`` the tail is one token further than what is continued.
    for past in range(0, kept, chunk):
        append(runtime, first, past, min(chunk, kept - past))
    if drop:
        append(runtime, first, kept, 1)
    blocks, tail = exported(runtime, first, at)
    for slot in {first, second}:
        append(runtime, slot, 0, 0, TEXT[::-1][:350])  # another sequence takes the slot
    computed = int(kept // chunk * share) * chunk
    for past in range(0, computed, chunk):
        append(runtime, second, past, chunk)
    runtime.import_blocks(second, blocks[computed // BLOCK :], tail, at, keep=kept, computed=computed)
    found = [append(runtime, second, kept + offset, 1) for offset in range(30)]  # beyond the window's next eviction
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("precision", [FP32, Precision("fp16"), Precision("int4", 16), Precision("int8")], ids=str)
@pytest.mark.parametrize(
    ("family", "every"), [("4b", 5), ("12b", 17), pytest.param("4b", 1, marks=pytest.mark.soak, id="4b-all")]
)
def test_every_boundary_of_a_prompt_with_images_ends_bit_for_bit_as_a_cold_run(family, every, precision):
    runtime, encoder = opened(family, precision), vision(tiny(family), precision)
    item = prompt(tiny(family), np.random.default_rng(2), text=220, pictures=2)
    assert len(item.ids) > 3 * FAMILIES[family].text["sliding_window"]
    assert runtime._slots.evicted(len(item.ids)) > 0
    cold = Driver(runtime, [item], encoder)
    cold.prefill()
    cold.decode(2)
    for at in range(1, len(item.ids), every if precision == FP32 or every == 1 else 6 * every):
        if any(start < at < stop for start, stop in item.spans):
            continue
        first = Driver(runtime, [item], encoder)
        first.append([(0, at)])
        blocks, tail = exported(runtime, 0, at)
        append(runtime, 0, 0, 0, TEXT[:300])
        resumed = Driver(runtime, [item], encoder)
        resumed.done[0] = at
        runtime.import_blocks(0, blocks, tail, at)
        resumed.append([(at, len(item.ids))])
        resumed.decode(2)
        np.testing.assert_array_equal([*first.logits[0], *resumed.logits[0]], cold.logits[0])
        assert resumed.tokens == cold.tokens


@pytest.mark.parametrize("precision", [Precision("fp16"), Precision("int4", 16)], ids=str)
def test_float16_caches_continue_bit_for_bit(precision):
    runtime = opened("4b", precision)
    append(runtime, 1, 0, 77)
    blocks, tail = exported(runtime, 1, 77)
    wanted = append(runtime, 1, 77, 3)
    runtime.import_blocks(0, blocks, tail, 77)
    np.testing.assert_array_equal(append(runtime, 0, 77, 3), wanted)


def test_nothing_is_held_beyond_blocks_and_window(runtime):
    model, layout = runtime._model, runtime.kv_layout
    row = 2 * model.num_kv_heads * model.head_dim * 4
    num_local = model.layer_types.count("local")
    assert layout.block_bytes == BLOCK * row * (model.num_layers - num_local)
    for length in (0, 1, BLOCK - 1, BLOCK, 90):
        rows = (length % BLOCK) * (model.num_layers - num_local) + min(length, model.sliding_window) * num_local
        assert layout.tail_bytes(length) == row * rows


def test_a_bit_of_every_payload_matters(runtime):
    append(runtime, 0, 0, 70)
    blocks, tail = exported(runtime, 0, 70)
    runtime.import_blocks(1, blocks, tail, 70)
    wanted = append(runtime, 1, 70, 1)
    for payload in (*blocks, tail):
        values = np.frombuffer(payload, np.float32)
        kept = values.copy()
        values += 1
        runtime.import_blocks(1, blocks, tail, 70)
        assert not np.array_equal(append(runtime, 1, 70, 1), wanted)
        values[:] = kept


def test_layouts_that_differ_have_other_identities():
    layouts = [
        opened("1b").kv_layout,
        opened("4b").kv_layout,
        opened("1b", Precision("fp16")).kv_layout,
        decoder(tiny("1b"), block_tokens=32).kv_layout,
    ]
    assert len({layout.identity for layout in layouts}) == len(layouts)
    assert opened("1b").kv_layout == layouts[0]


def test_buffers_and_positions_that_do_not_fit_are_refused(runtime):
    append(runtime, 0, 0, 40)
    blocks, tail = exported(runtime, 0, 40)
    block = blocks[0]
    for slot, start, into in ((SLOTS, 0, block), (0, 5, block), (0, 432, block), (0, 0, block[:-1])):
        with pytest.raises(InternalError):
            runtime.export_block(slot, start, into)
    for slot, length, into in ((-1, 40, tail), (0, CONTEXT + 1, tail), (0, 41, tail)):
        with pytest.raises(InternalError):
            runtime.export_tail(slot, length, into)
    for some, end, length, keep in (
        (blocks[:1], tail, 40, 40),
        (blocks, tail, 39, 39),
        (blocks, tail, 40, 38),
        (blocks, tail, 40, 41),
        (blocks, tail[:-4], 40, 40),
        ([block[:-4], block], tail, 40, 40),
    ):
        with pytest.raises(InternalError):
            runtime.import_blocks(1, some, end, length, keep=keep)
    for some, computed in ((blocks, BLOCK), (blocks[1:], BLOCK - 1), ([], 41)):
        with pytest.raises(InternalError):
            runtime.import_blocks(1, some, tail, 40, computed=computed)
