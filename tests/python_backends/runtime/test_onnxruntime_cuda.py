"""What ONNX Runtime's CUDA provider is given: its graph, steps without padding, caches in a device's memory.

Computed on the CPU, whose kernels take the same. On a card: `tests.gpu.ort` and `tests.gpu.serve`.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.checkpoint import open_checkpoint
from builders.quantize import Precision
from python_backends.errors import ArtifactError, ConfigError, InternalError
from python_backends.runtime import providers
from python_backends.runtime.cuda_graph import rewrite_for_cuda
from python_backends.runtime.gpu.interpreter import host_view
from python_backends.runtime.onnxruntime import OnnxRuntimeDecoder, OnnxRuntimeVision
from python_backends.runtime.providers import CPU, CUDA, open_on
from tests.checkpoints import FIRST_TEXT, IMAGE, tiny
from tests.driver import FP32, Driver, artefacts, decoder, decoder_as_on_gpu, step_inputs, vision
from tests.prompts import prompt

FP16 = Precision("fp16")
SLOTS, CONTEXT, BLOCK = 3, 440, 16
TEXT = np.random.default_rng(5).integers(FIRST_TEXT, IMAGE, 400).tolist()


@functools.cache
def on_gpu(family: str, precision: Precision = FP32) -> OnnxRuntimeDecoder:
    return decoder_as_on_gpu(tiny(family), precision, num_slots=SLOTS, context=CONTEXT, block_tokens=BLOCK)


def caches(runtime: OnnxRuntimeDecoder) -> dict[str, np.ndarray]:
    return {name: host_view(tensor).copy() for name, tensor in runtime._slots._tensors.items()}


# --- the same tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "error"), [(FP32, 1e-5), (FP16, 2e-3), (Precision("int8"), 2e-3), (Precision("int4", 16), 2e-3)]
)
@pytest.mark.parametrize("family", ["1b", "4b", "12b"])
def test_prompts_with_images_in_chunks_give_what_the_graph_for_the_cpu_gives(family, precision, error):
    has_images = open_checkpoint(tiny(family)).config.vision is not None
    encoder = vision(tiny(family), precision) if has_images else None
    rng = np.random.default_rng(2)
    items = [prompt(tiny(family), rng, text=200, pictures=2 * has_images), prompt(tiny(family), rng, text=33)]
    results = []
    for make in (decoder, decoder_as_on_gpu):
        # At level 0 activations keep their bits: rounded to eight, one that differs by little moves all of its block.
        driver = Driver(make(tiny(family), precision, num_slots=2, context=CONTEXT, accuracy_level=0), items, encoder)
        driver.prefill([[61, 150], [20]])
        results.append([np.array(logits) for logits in driver.logits])
    for wanted, found in zip(*results, strict=True):
        assert np.linalg.norm(found - wanted) < error * np.linalg.norm(wanted)


@settings(max_examples=15, deadline=None)
@given(cuts=st.tuples(*[st.lists(st.integers(1, 259), max_size=8)] * 2), precision=st.sampled_from([FP32, FP16]))
def test_any_chunking_of_a_batch_gives_the_result_of_one_chunk_alone(cuts, precision):
    items, wanted = uncut(precision)
    driver = Driver(on_gpu("4b", precision), items, vision(tiny("4b")))
    driver.prefill(cuts)
    driver.decode(3)
    for found, alone in zip(driver.logits, wanted, strict=True):
        error = np.linalg.norm(np.array(found) - alone) / np.linalg.norm(alone)
        assert error < (1e-5 if precision == FP32 else 1e-2)


@functools.cache
def uncut(precision):
    rng = np.random.default_rng(7)
    items = [prompt(tiny("4b"), rng, text=240, pictures=2), prompt(tiny("4b"), rng, text=70)]
    wanted = []
    for item in items:
        driver = Driver(on_gpu("4b", precision), [item], vision(tiny("4b")))
        driver.prefill()
        driver.decode(3)
        wanted.append(np.array(driver.logits[0]))
    return items, wanted


@pytest.mark.parametrize("precision", [FP32, FP16], ids=str)
def test_block_attention_and_likely_tokens_are_those_of_the_cpu(precision):
    stock = decoder(tiny("4b"), precision, num_slots=SLOTS, context=CONTEXT)
    found = []
    for runtime in (stock, on_gpu("4b", precision)):
        runtime.step(step_inputs(0, [TEXT[:90], [], TEXT[90:120]], [0, 0, 0]))
        found.append(
            runtime.step(step_inputs(0, [[5], [], [6]], [90, 0, 30], attention_block=BLOCK, top_n=4), want_logits=True)
        )
    rows = [0, 2]
    assert found[1].block_attention.shape == (3, 6)
    np.testing.assert_allclose(found[1].block_attention[rows], found[0].block_attention[rows], atol=2e-3)
    np.testing.assert_array_equal(found[1].top_ids[rows], found[0].top_ids[rows])
    np.testing.assert_allclose(found[1].top_logprobs[rows], found[0].top_logprobs[rows], atol=2e-2)
    np.testing.assert_array_equal(found[1].next_token[rows], found[0].next_token[rows])


# --- slots ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [FP32, FP16], ids=str)
def test_idle_rows_keep_their_caches(precision):
    runtime = on_gpu("4b", precision)
    runtime.step(step_inputs(0, [TEXT[:30], TEXT[30:100], TEXT[100:103]], [0, 0, 0]))
    before = caches(runtime)
    runtime.step(step_inputs(0, [[], TEXT[4:21], []], [30, 70, 0]))
    runtime.step(step_inputs(0, [[], [5], []], [30, 87, 3]))
    runtime.step(step_inputs(0, [[], [], []], [30, 88, 3]))
    for name, cache in caches(runtime).items():
        np.testing.assert_array_equal(cache[[0, 2]], before[name][[0, 2]])
        assert not np.array_equal(cache[1], before[name][1])


@pytest.mark.parametrize("precision", [FP32, FP16], ids=str)
@settings(max_examples=12, deadline=None)
@given(at=st.integers(1, 360), slots=st.tuples(st.integers(0, 2), st.integers(0, 2)), drop=st.booleans())
def test_a_sequence_continues_bit_for_bit_from_blocks_and_tail_and_from_a_copy_of_its_slot(precision, at, slots, drop):
    runtime = on_gpu("4b", precision)
    first, second = slots
    kept = at - drop
    layout = runtime.kv_layout

    def follow(slot):
        return [
            runtime.step(step_inputs(slot, [[TEXT[kept + n]]], [kept + n]), want_logits=True).logits[0]
            for n in range(3)
        ]

    runtime.step(step_inputs(first, [TEXT[:at]], [0]))
    blocks = [memoryview(bytearray(layout.block_bytes)) for _ in range(at // BLOCK)]
    for index, block in enumerate(blocks):
        runtime.export_block(first, index * BLOCK, block)
    tail = memoryview(bytearray(layout.tail_bytes(at)))
    runtime.export_tail(first, at, tail)
    runtime.import_blocks(first, blocks, tail, at, keep=kept)
    copy = runtime.export_slot(first, kept)
    wanted = follow(first)
    for slot in {first, second}:
        runtime.step(step_inputs(slot, [TEXT[::-1][:350]], [0]))  # another sequence takes the slot
    runtime.import_blocks(second, blocks, tail, at, keep=kept)
    np.testing.assert_array_equal(follow(second), wanted)
    runtime.import_slot(first, copy)
    np.testing.assert_array_equal(follow(first), wanted)


def test_states_and_blocks_of_other_sizes_are_refused():
    runtime = on_gpu("4b", FP16)
    runtime.step(step_inputs(0, [TEXT[:40]], [0]))
    with pytest.raises(InternalError, match="another model or of other cache sizes"):
        runtime.import_slot(0, on_gpu("1b", FP16).export_slot(0, 8))
    with pytest.raises(InternalError, match="a buffer of"):
        runtime.export_block(0, 0, memoryview(bytearray(3)))


def test_windows_hold_what_the_kernels_take_and_drafts_end_where_nothing_can_be_taken_back():
    window = open_checkpoint(tiny("4b")).config.text.sliding_window
    half, full = on_gpu("4b", FP16), on_gpu("4b", FP32)
    assert {shape[2] for shape in (cache.shape for cache in caches(half).values())} == {window, CONTEXT}
    assert {shape[2] for shape in (cache.shape for cache in caches(full).values())} == {CONTEXT}
    assert [half.max_draft(past, 4) for past in (0, window - 3, window)] == [4, 2, 0]
    assert full.max_draft(window, 4) == 4
    assert not half.spec.wants_even_chunks
    with pytest.raises(ConfigError, match="gpu_memory_gb"):
        decoder_as_on_gpu(tiny("4b"), FP16, memory_limit=1000)


# --- the graph ------------------------------------------------------------------------------------------------


def nodes_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [each.g for node in graph.node for each in node.attribute if each.type == onnx.AttributeProto.GRAPH]
    return [*graph.node, *(node for part in inner for node in nodes_of(part))]


@pytest.mark.parametrize("precision", [FP32, FP16, Precision("bf16"), Precision("int4", 16)], ids=str)
def test_the_graph_has_what_the_provider_has_kernels_for_and_no_cache_leaves_through_another_node(precision):
    model = onnx.load_from_string(rewrite_for_cuda(artefacts(tiny("4b"), precision) / "decoder.onnx"))
    nodes = nodes_of(model.graph)
    assert "Attention" not in {node.op_type for node in nodes}
    grouped = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    assert bool(grouped) == (precision != FP32)
    assert all(len(node.input) == 7 for node in grouped)  # none that onnxruntime-gpu 1.31 does not know
    attending = "ScatterND" if precision == FP32 else "GroupQueryAttention"
    takers = {node.op_type for node in nodes for name in node.input if name.startswith(("past_key", "past_value"))}
    readers = {node.op_type for node in nodes for name in node.input if name.startswith("present_")}
    assert takers == {attending, "Slice", "Shape"}  # a chunk's images read the past
    assert readers <= {"Slice"}
    cache = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}["past_key.0"]
    wanted = {"fp32": onnx.TensorProto.FLOAT, "bf16": onnx.TensorProto.BFLOAT16}
    assert cache == wanted.get(precision.name, onnx.TensorProto.FLOAT16)
    names = [name for node in model.graph.node for name in node.output if name]
    assert len(names) == len(set(names))


def test_a_damaged_graph_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "decoder.onnx").write_bytes(b"not an artefact" * 1000)
    shape = on_gpu("4b")._model
    sizes = {"num_slots": 1, "max_context_length": 64, "memory_limit": 2**30}
    for device in (on_gpu("4b")._slots._device,):
        with pytest.raises(ArtifactError, match="wicore build"):
            OnnxRuntimeDecoder(tmp_path, shape, **sizes, device=device)
        with pytest.raises(ArtifactError, match="wicore build"):
            OnnxRuntimeDecoder(tmp_path / "none", shape, **sizes, device=device)


# --- where it runs --------------------------------------------------------------------------------------------


def test_the_gpu_is_taken_where_there_is_one_and_a_wheel_without_it_is_told_apart(monkeypatch, caplog):
    def make(provider):
        if provider == CUDA and broken:
            raise ArtifactError("libcublas.so.13 cannot be loaded")
        return provider

    broken = False
    monkeypatch.setattr(providers, "missing_for_cuda", lambda: "")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert [open_on(wanted, "fp16", make) for wanted in ("auto", "cuda", "cpu")] == [CUDA, CUDA, CPU]
    broken = True
    assert open_on("auto", "fp16", make) == CPU
    assert "ONNX Runtime runs on the CPU: libcublas.so.13 cannot be loaded" in caplog.text
    with pytest.raises(ArtifactError, match=r"libcublas\.so\.13"):
        open_on("cuda", "fp16", make)
    with pytest.raises(ArtifactError, match=r"bf16, .*libcublas\.so\.13"):
        open_on("auto", "bf16", make)
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.1")
    with pytest.raises(ArtifactError, match=r"1\.31\.1 is too old for the CPU.*onnxruntime>=1\.32"):
        open_on("auto", "fp16", make)


def test_a_session_on_a_gpu_that_cannot_be_used_says_what_to_install():
    if not providers.missing_for_cuda():
        pytest.skip("there is a GPU")
    with pytest.raises(ArtifactError, match=r"libcublas.* cannot be loaded.*pip install 'onnxruntime-gpu"):
        OnnxRuntimeVision(artefacts(tiny("4b"), FP32), provider=CUDA)


def test_the_cpu_needs_neither_cuda_nor_its_bindings():
    code = (
        "import sys; from python_backends.runtime.providers import open_on\n"
        "assert open_on('auto', 'int8', str) == 'cpu'\n"
        "assert not any(name.startswith('cuda.') for name in sys.modules)"
    )
    if not providers.missing_for_cuda():
        pytest.skip("there is a GPU")
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
