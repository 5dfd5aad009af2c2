"""TensorRT-RTX builds every decoder's plans without a GPU, and what it built is what was asked for."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders.checkpoint import open_checkpoint
from builders.gpu_plans import MAX_TOKENS, TOKENS, PlanWriter
from builders.gpu_weights import ACTIVATIONS
from builders.graph.pieces import write_pieces
from builders.graph.standard import ONNX_DTYPES, matrix_shape
from builders.model_config import TextConfig, read_model_config
from builders.plan import PlanBuilder
from builders.random_checkpoint import shape_config
from python_backends.errors import ArtifactError, BuildError
from python_backends.manifest import file_sha256
from python_backends.runtime.gpu.engines import load_engine
from python_backends.runtime.gpu.plans import BETWEEN, FIRST, INDEX_FILE, LAST, PIECES, PlanIndex, open_plans
from python_backends.runtime.gpu.weights import Names
from tests.checkpoints import DEMO, scratch

RTX = "tensorrt_rtx"
PRECISIONS = ("bf16", "fp16", "fp8", "int8", "int4")
SHAPES = ("demo", "1b", "4b", "12b", "27b")
"""The demo checkpoint's decoder, and two layers of each published one."""
LAYERS = 2


def decoder(shape: str, folder: Path) -> TextConfig:
    if shape == "demo":
        return open_checkpoint(DEMO).config.text
    (folder / "config.json").write_text(json.dumps(shape_config(shape, LAYERS)))
    return read_model_config(folder).text


def build(shape: str, precision: Any, folder: Path, capabilities: tuple[str, ...] = ("8.9",)) -> PlanIndex:
    return PlanWriter(PlanBuilder(RTX, capabilities), precision).decoder(decoder(shape, folder), folder)


@functools.cache
def _demo() -> Path:
    folder = scratch() / "demo-plans"
    folder.mkdir()
    build("demo", "bf16", folder)
    return folder


def demo_plans(folder: Path) -> PlanIndex:
    """The demo checkpoint's plans in bf16, built once and copied into ``folder``."""
    shutil.copytree(_demo(), folder, dirs_exist_ok=True)
    index = open_plans(folder)
    assert index is not None
    return index


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cut_decoder_has_no_attention_in_it_and_products_of_the_weights_own_type(
    tmp_path: Path, shape: str, precision: Any
) -> None:
    text = decoder(shape, tmp_path)
    index = build(shape, precision, tmp_path)
    assert index == open_plans(tmp_path)
    assert tuple(index.plans) == PIECES
    for plan in index.plans.values():
        assert not {"ATTENTION", "KV_CACHE_UPDATE", "SOFTMAX"} & set(plan.network_layers)
        assert "attention" not in plan.engine_layers
        products = {FIRST: 1, BETWEEN: 4, LAST: 3}[plan.name]
        assert plan.network_layers["MATRIX_MULTIPLY"] == products
        # A product of TensorRT's own for each in the graph and profile; what is merged into others becomes slower ones.
        assert plan.engine_layers["gemm"] == products * len(TOKENS)
        assert "runtime_fusion" not in plan.engine_layers
        quantized = {"fp8": products, "int8": products, "int4": {FIRST: 1, BETWEEN: 2, LAST: 1}[plan.name]}
        assert plan.network_layers.get("QUANTIZE", 0) == quantized.get(precision, 0)
        assert [profile.name for profile in plan.profiles] == [name for name, *_ in TOKENS]
    act = ACTIVATIONS[precision]
    packed = matrix_shape(text, Names.QKV)[0]
    tensors = {tensor.name: (tensor.dtype, tensor.shape) for tensor in index[BETWEEN].inputs + index[BETWEEN].outputs}
    assert tensors["attended"] == (act, (-1, text.num_heads * text.head_dim))
    assert tensors["packed"] == (act, (-1, packed))
    assert tensors["stream"] == tensors["next_stream"] == ("fp32", (-1, text.hidden_size))
    stored = {"fp8": "fp8e4nv", "int8": "i8", "int4": "i4"}.get(precision, act)
    assert tensors[Names.DOWN] == (stored, (text.hidden_size, text.intermediate_size))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_plans_for_all_gpus_of_tensorrts_own_choice(tmp_path: Path, precision: Any) -> None:
    index = build("27b", precision, tmp_path, ())
    assert index.compute_capabilities == ()
    assert sum(plan.num_bytes for plan in index.plans.values()) < 50e6


def test_steps_find_the_profile_they_fit_and_larger_ones_none(tmp_path: Path) -> None:
    plan = demo_plans(tmp_path)[FIRST]
    width = plan.inputs[0].shape[-1]
    found = [plan.profile(stream=(tokens, width)) for tokens in (1, 8, 9, 16, 17, 128, 129, MAX_TOKENS)]
    assert found == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ArtifactError, match=r"no profile.*wicore build"):
        plan.profile(stream=(MAX_TOKENS + 1, width))


def test_the_same_graph_has_the_same_hash_and_another_precision_another(tmp_path: Path) -> None:
    text = decoder("demo", tmp_path)
    first, again, other = (
        file_sha256(write_pieces(text, precision, tmp_path)[BETWEEN]) for precision in ("bf16", "bf16", "fp8")
    )
    assert first == again != other
    assert demo_plans(tmp_path)[BETWEEN].onnx_sha256 == first


@pytest.mark.parametrize(
    ("capability", "message"),
    [("9.0", "does not build for compute capability 9.0 alone.*Leave --compute-capability out"), ("89", "form 8.9")],
)
def test_gpus_that_cannot_be_named_are_refused(capability: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        PlanBuilder(RTX, (capability,))


def test_a_precision_that_a_gpu_lacks_is_refused_with_tensorrts_reason(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"cannot build first.*fp8"):
        build("demo", "fp8", tmp_path, ("8.6",))


def test_a_module_that_is_not_installed_says_how_to_get_it_or_do_without() -> None:
    with pytest.raises(BuildError, match=r"tensorrt cannot be imported.*wicore\[tensorrt\].*--plans"):
        PlanBuilder("tensorrt")


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "capability", "message"),
    [
        ({}, None, "no GPU, or an NVIDIA driver that is too old.*--runtime onnxruntime"),
        ({}, 86, "built for compute capability 8.9, this GPU has 8.6.*--compute-capability 8.6"),
        ({"version": "1.5.0"}, 89, "built by tensorrt_rtx 1.5.0, installed is 1.6.*--runtime tensorrt-rtx"),
        ({"module": "tensorrt"}, 89, r"tensorrt cannot be imported.*wicore\[tensorrt\]"),
    ],
)
def test_a_plan_that_cannot_be_loaded_says_why_and_what_to_do(
    tmp_path: Path, change: dict[str, Any], capability: int | None, message: str
) -> None:
    index = dataclasses.replace(demo_plans(tmp_path), **change)
    with pytest.raises(ArtifactError, match=message):
        load_engine(tmp_path, index, index[FIRST], capability=capability)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _, index: index.update(format=7), "has format 7"),
        (lambda _, index: index.pop("version"), "is corrupt"),
        (lambda _, index: index["plans"]["first"].update(profiles=3), "is corrupt"),
        (lambda folder, _: (folder / "between.plan").unlink(), "is missing or not what was built"),
        (lambda folder, _: (folder / "last.plan").write_bytes(b"short"), "is missing or not what was built"),
    ],
)
def test_damaged_plans_are_refused_with_how_to_rebuild(
    tmp_path: Path, damage: Callable[[Path, Any], object], message: str
) -> None:
    demo_plans(tmp_path)
    values = json.loads((tmp_path / INDEX_FILE).read_text())
    damage(tmp_path, values)
    (tmp_path / INDEX_FILE).write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=f"{message}.*wicore build"):
        open_plans(tmp_path)


def test_a_build_without_plans_has_no_index(tmp_path: Path) -> None:
    assert open_plans(tmp_path) is None


def test_every_storage_has_an_onnx_type() -> None:
    assert set(ONNX_DTYPES) == {"fp32", *PRECISIONS}
