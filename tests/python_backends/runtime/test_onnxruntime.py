"""The ONNX Runtime runtime: caches in place, slots, chunks, images, limits and errors."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.checkpoint import open_checkpoint
from builders.quantize import Precision
from python_backends.errors import ArtifactError, ConfigError, InternalError
from python_backends.runtime.onnxruntime import OnnxRuntimeDecoder, OnnxRuntimeVision
from tests.checkpoints import FAMILIES, FIRST_TEXT, IMAGE, tiny
from tests.driver import FP32, Driver, artefacts, decoder, model_shape, step_inputs, vision
from tests.prompts import Prompt, prompt

CLOSE = 1e-5
"""Of the largest logit, between two ways to compute the same in float32."""


def tokens_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(FIRST_TEXT, IMAGE, count).tolist()


def assert_close(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    np.testing.assert_allclose(found, wanted, atol=CLOSE * np.abs(wanted).max(), rtol=0)


# --- chunks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["1b", "4b", "12b"])
def whole(request):
    """A runtime, three prompts of unequal lengths, and what they give when each is one chunk and a slot of its own."""
    family = request.param
    rng = np.random.default_rng(11)
    has_images = FAMILIES[family].vision is not None
    prompts = [
        prompt(tiny(family), rng, text=size, pictures=count * has_images) for size, count in ((70, 2), (9, 0), (41, 1))
    ]
    runtime = decoder(tiny(family))
    encoder = vision(tiny(family)) if has_images else None
    alone = []
    for item in prompts:
        driver = Driver(runtime, [item], encoder)
        driver.prefill()
        driver.decode(3)
        alone.append((driver.logits[0], driver.tokens[0]))
    return runtime, encoder, prompts, alone


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 259), max_size=12), precision=st.sampled_from([FP32, Precision("int4", 16)]))
def test_any_chunking_of_a_prompt_gives_one_chunk_bit_for_bit(cuts, precision):
    # What makes a request that is resumed anywhere end as a cold one; see `memory.SUM_ROWS`.
    runtime, encoder, item, wanted = uncut(precision)
    driver = Driver(runtime, [item], encoder)
    driver.prefill([cuts])
    np.testing.assert_array_equal(driver.logits[0], wanted)


@functools.cache
def uncut(precision):
    """A runtime and a prompt with pictures far beyond the window, and its logits as one chunk."""
    runtime, encoder = decoder(tiny("4b"), precision), vision(tiny("4b"), precision)
    item = prompt(tiny("4b"), np.random.default_rng(7), text=240, pictures=2)
    driver = Driver(runtime, [item], encoder)
    driver.prefill()
    return runtime, encoder, item, driver.logits[0]


@settings(max_examples=25, deadline=None)
@given(cuts=st.tuples(*[st.lists(st.integers(1, 119), max_size=8)] * 3))
def test_any_chunking_of_a_batch_gives_the_result_of_one_chunk_alone(whole, cuts):
    runtime, encoder, prompts, alone = whole
    driver = Driver(runtime, prompts, encoder)
    driver.prefill(cuts)
    driver.decode(3)
    for logits, tokens, (wanted, wanted_tokens) in zip(driver.logits, driver.tokens, alone, strict=True):
        assert_close(logits, wanted)
        assert tokens == wanted_tokens


def test_one_token_at_a_time_far_beyond_the_window_gives_the_result_of_one_chunk(whole):
    runtime, _, _, _ = whole
    item = Prompt(tokens_of(1, 150))
    driver = Driver(runtime, [item])
    driver.prefill()
    slowly = Driver(runtime, [item])
    slowly.prefill([range(1, 150)])
    assert_close(slowly.logits[0], driver.logits[0])


def test_padding_is_never_read(whole):
    runtime, _, _, _ = whole
    chunks = [tokens_of(1, 12), tokens_of(2, 5)]
    inputs = step_inputs(0, chunks, [0, 0])
    inputs.input_ids[1, 5:] = FIRST_TEXT + 7
    first = runtime.step(step_inputs(0, chunks, [0, 0]), want_logits=True).logits
    second = runtime.step(inputs, want_logits=True).logits
    np.testing.assert_array_equal(first[1, :5], second[1, :5])
    follow = step_inputs(0, [[9], [9]], [12, 5])
    wanted = runtime.step(step_inputs(1, [[9]], [5]), want_logits=True).logits[0]
    assert_close(runtime.step(follow, want_logits=True).logits[1], wanted)


# --- slots ----------------------------------------------------------------------------------------------------


def test_idle_rows_keep_their_caches(whole):
    runtime, _, _, _ = whole
    runtime.step(step_inputs(0, [tokens_of(1, 30), tokens_of(2, 40), tokens_of(3, 3)], [0, 0, 0]))
    before = {name: cache.copy() for name, cache in runtime._slots.buffers.items()}
    # Rows 0 and 2 are idle, whatever the step says of their past, in a prefill and in decode steps.
    runtime.step(step_inputs(0, [[], tokens_of(4, 17), []], [30, 40, 0]))
    runtime.step(step_inputs(0, [[], [5], []], [30, 57, 3]))
    runtime.step(step_inputs(0, [[], [6], []], [0, 58, 0]))
    for name, cache in runtime._slots.buffers.items():
        np.testing.assert_array_equal(cache[[0, 2, 3]], before[name][[0, 2, 3]])
        assert not np.array_equal(cache[1], before[name][1])


def test_a_step_with_only_idle_rows_is_allowed(whole):
    runtime, _, _, _ = whole
    outputs = runtime.step(step_inputs(0, [[], []], [0, 7]))
    assert outputs.next_token.shape == (2, 1)


def test_a_slot_is_reused_without_a_trace_of_its_last_sequence(whole):
    runtime, encoder, prompts, alone = whole
    runtime.step(step_inputs(0, [tokens_of(9, 200)], [0]))
    driver = Driver(runtime, prompts[:1], encoder)
    driver.prefill([[13]])
    assert_close(driver.logits[0], alone[0][0][: len(driver.logits[0])])


def test_steps_address_the_slots_they_name(whole):
    runtime, _, _, _ = whole
    ids = tokens_of(5, 25)
    wanted = runtime.step(step_inputs(0, [ids], [0]), want_logits=True).logits
    for slot in (3, 1):
        assert_close(runtime.step(step_inputs(slot, [ids], [0]), want_logits=True).logits, wanted)
    pair = runtime.step(step_inputs(1, [[7], [], [7]], [25, 0, 25]), want_logits=True).logits
    assert_close(pair[2], pair[0])


def test_logits_are_computed_for_the_positions_asked_for_only(whole):
    runtime, _, _, _ = whole
    inputs = step_inputs(0, [tokens_of(1, 20), tokens_of(2, 11)], [0, 0])
    every = runtime.step(inputs, want_logits=True)
    some = dataclasses.replace(
        inputs, logit_positions=np.array([[19, 3], [10, 0]], np.int32), uniform=np.full((2, 2), 0.5, np.float32)
    )
    found = runtime.step(some, want_logits=True)
    assert found.logits.shape[:2] == (2, 2)
    assert_close(found.logits, every.logits[[[0], [1]], some.logit_positions])
    np.testing.assert_array_equal(found.next_token, every.next_token[[[0], [1]], some.logit_positions])
    assert runtime.step(inputs).logits is None


def test_the_last_token_of_the_context_can_be_computed_in_a_padded_batch():
    runtime = decoder(tiny("4b"), num_slots=3, context=64)
    ids = tokens_of(6, 64)
    wanted = runtime.step(step_inputs(0, [ids], [0]), want_logits=True).logits[0]
    runtime.step(step_inputs(0, [ids[:62], ids[:63]], [0, 0]))
    # Padded to 20, rows 0 and 1 have no room for their padding; row 2 is idle at the end of its context.
    found = runtime.step(step_inputs(0, [ids[62:], ids[63:], []], [62, 63, 64]), want_logits=True).logits
    assert_close(found[0, :2], wanted[62:])
    assert_close(found[1, 0], wanted[63])
    chunks = [ids[62:], tokens_of(7, 20), []]
    runtime.step(step_inputs(0, [ids[:62]], [0]))
    found = runtime.step(step_inputs(0, chunks, [62, 0, 64]), want_logits=True).logits
    assert_close(found[0, :2], wanted[62:])


# --- memory ---------------------------------------------------------------------------------------------------


def test_past_and_present_are_bound_to_the_addresses_of_our_buffers(whole):
    runtime, _, _, _ = whole
    runtime.step(step_inputs(1, [[5], [6]], [0, 0]))
    outputs = runtime._binding(1, 2, False, False, False).get_outputs()
    names = [item.name for item in runtime._session.get_outputs()]
    pointers = [value.data_ptr() for value in outputs]
    bound = set(pointers)
    assert len(names) >= 2 * len(runtime._model.layer_types)
    for cache in runtime._slots.buffers.values():
        assert cache[1:].ctypes.data in bound


def test_a_step_touches_only_the_rows_it_appends():
    """Caches of 2 GB: a copy of them, anywhere, would make them resident."""
    text = open_checkpoint(tiny("4b")).config.text
    row = 2 * 4 * text.num_kv_heads * text.head_dim * sum(kind == "global" for kind in text.layer_types)
    context = 2**31 // (2 * row)
    shape = dataclasses.replace(model_shape(open_checkpoint(tiny("4b")).config), max_context_length=context)
    runtime = OnnxRuntimeDecoder(
        artefacts(tiny("4b"), FP32), shape, num_slots=2, max_context_length=context, memory_limit=2**32, num_threads=2
    )
    item = prompt(tiny("4b"), np.random.default_rng(1), text=60, pictures=1)
    Driver(decoder(tiny("4b")), [item], vision(tiny("4b"))).prefill()  # what a step allocates at all
    process = psutil.Process()
    before = process.memory_info().rss
    driver = Driver(runtime, [item, item], vision(tiny("4b")))
    driver.prefill([[30]] * 2)
    driver.decode(5)
    assert sum(cache.nbytes for cache in runtime._slots.buffers.values()) > 1.9 * 2**30
    assert process.memory_info().rss - before < 64 * 2**20
    runtime.close()


def test_no_node_but_attention_has_a_cache_among_its_outputs(tmp_path, monkeypatch):
    create = onnxruntime.InferenceSession

    def profiled(path, options, **arguments):
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "profile")
        return create(path, options, **arguments)

    monkeypatch.setattr(onnxruntime, "InferenceSession", profiled)
    runtime = decoder(tiny("4b"), context=4096)
    item = prompt(tiny("4b"), np.random.default_rng(1), text=60, pictures=2)
    driver = Driver(runtime, [item, item], vision(tiny("4b")))
    driver.prefill([[30]] * 2)
    driver.decode(2)
    events = json.loads(Path(runtime._session.end_profiling()).read_text())
    nodes = [event["args"] for event in events if event["name"].endswith("_kernel_time")]
    cache_bytes = min(cache[:2].nbytes for name, cache in runtime._slots.buffers.items() if cache.shape[2] == 4096)
    writers = {node["op_name"] for node in nodes if int(node["output_size"]) >= cache_bytes}
    assert writers == {"GroupQueryAttention"}
    assert "If" in {node["op_name"] for node in nodes}


# --- other precisions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [Precision("fp16"), Precision("int8"), Precision("int4", 16)], ids=str)
def test_batches_and_chunks_agree_in_other_precisions(precision):
    runtime = decoder(tiny("4b"), precision)
    encoder = vision(tiny("4b"), precision)
    rng = np.random.default_rng(2)
    prompts = [prompt(tiny("4b"), rng, text=50, pictures=2), prompt(tiny("4b"), rng, text=33)]
    alone = []
    for item in prompts:
        driver = Driver(runtime, [item], encoder)
        driver.prefill()
        alone.append(np.array(driver.logits[0]))
    driver = Driver(runtime, prompts, encoder)
    driver.prefill([[5, 41], [20]])
    for logits, wanted in zip(driver.logits, alone, strict=True):
        error = np.abs(np.array(logits) - wanted)
        assert error.max() < 0.2 * np.abs(wanted).max()
        assert np.sqrt((error**2).mean()) < 0.02 * np.abs(wanted).max()


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(artefacts(tiny("4b"), FP32), tmp_path / "stage")
    return tmp_path / "stage"


def open_decoder(folder: Path, **sizes: int) -> OnnxRuntimeDecoder:
    sizes = {"num_slots": 2, "max_context_length": 128, "memory_limit": 2**30, **sizes}
    return OnnxRuntimeDecoder(folder, model_shape(open_checkpoint(tiny("4b")).config), num_threads=1, **sizes)


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(b"not an artefact" * 1000)


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "garbage"])
@pytest.mark.parametrize("name", ["decoder", "vision_encoder"])
def test_a_damaged_graph_is_refused_with_what_to_do(folder, name, how):
    damage(folder / f"{name}.onnx", how)
    opener = open_decoder if name == "decoder" else OnnxRuntimeVision
    with pytest.raises(ArtifactError, match="wicore build"):
        opener(folder)


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_damaged_weights_are_refused_with_what_to_do(folder, how):
    damage(folder / "decoder.weights", how)
    with pytest.raises(ArtifactError, match="wicore build"):
        open_decoder(folder)


def test_a_graph_of_another_model_is_refused(folder):
    shutil.copy(folder / "vision_encoder.onnx", folder / "decoder.onnx")
    with pytest.raises(ArtifactError, match="wicore build"):
        open_decoder(folder)
    with pytest.raises(ArtifactError, match="another model"):
        open_decoder(artefacts(tiny("12b"), FP32))


def test_a_memory_limit_below_one_short_slot_is_refused(folder):
    with pytest.raises(ConfigError, match="cpu_memory_gb"):
        open_decoder(folder, memory_limit=1000)


def test_steps_beyond_slots_or_context_are_refused_and_change_nothing(folder):
    runtime = open_decoder(folder)
    runtime.step(step_inputs(0, [tokens_of(1, 20)], [0]))
    before = {name: cache.copy() for name, cache in runtime._slots.buffers.items()}
    for inputs in (
        step_inputs(1, [[5], [5]], [0, 0]),
        step_inputs(-1, [[5]], [0]),
        step_inputs(0, [[5]], [128]),
        step_inputs(0, [tokens_of(1, 129)], [0]),
        dataclasses.replace(step_inputs(0, [[5]], [0]), query_len=np.array([2], np.int32)),
        dataclasses.replace(step_inputs(0, [[5]], [0]), past_len=np.array([-1], np.int32)),
    ):
        with pytest.raises(InternalError):
            runtime.step(inputs)
    for name, cache in runtime._slots.buffers.items():
        np.testing.assert_array_equal(cache, before[name])


def test_ids_beyond_the_vocabulary_are_an_error_and_not_a_crash(folder):
    runtime = open_decoder(folder)
    with pytest.raises(InternalError):
        runtime.step(step_inputs(0, [[10**6]], [0]))
    assert runtime.step(step_inputs(0, [[5]], [0])).next_token.shape == (1, 1)


def test_images_are_refused_by_a_text_only_decoder():
    runtime = decoder(tiny("1b"))
    inputs = step_inputs(0, [[5]], [0], image_index=np.zeros((1, 1), np.int32))
    with pytest.raises(InternalError, match="text-only"):
        runtime.step(inputs)


def test_pixels_of_another_shape_are_refused():
    encoder = vision(tiny("4b"))
    assert encoder.image_shape == (3, 32, 32)
    with pytest.raises(InternalError, match="uint8"):
        encoder.encode(np.zeros((1, 3, 16, 16), np.uint8))
    assert encoder.encode(np.zeros((0, 3, 32, 32), np.uint8)).shape == (0, 16, 160)


def test_spec_tells_the_sizes_after_clipping(folder):
    spec = open_decoder(folder, num_slots=64, max_context_length=10**6, memory_limit=2**23).spec
    assert (spec.vocab_size, spec.hidden_size, spec.tokens_per_image, spec.image_token_id) == (512, 160, 16, IMAGE)
    assert spec.num_slots < 64
    assert spec.max_context_length <= 4096
