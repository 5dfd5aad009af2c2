"""The decoder in one plan: TensorRT has layers of its own for its caches and its attention, and compiles them fused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from builders.gpu_plans import STEPS, PlanWriter
from builders.graph.attention import CacheNames
from builders.graph.decoder import step_inputs
from builders.model_config import read_model_config
from builders.plan import PlanBuilder
from builders.random_checkpoint import shape_config
from python_backends.runtime.gpu.plans import SINGLE, open_plans
from python_backends.runtime.gpu.weights import Names
from tests.checkpoints import DEMO

CAPACITY = 2304
LAYERS = 2
CASES = [("demo", "bf16"), ("1b", "bf16"), ("4b", "fp16"), ("12b", "int8"), ("27b", "fp8"), ("27b", "int4")]


@pytest.mark.parametrize(("shape", "precision"), CASES)
def test_every_layer_appends_to_its_caches_and_attends_in_one_kernel(
    tmp_path: Path, shape: str, precision: Any
) -> None:
    source = DEMO
    if shape != "demo":
        (tmp_path / "config.json").write_text(json.dumps(shape_config(shape, LAYERS)))
        source = tmp_path
    config = read_model_config(source)
    text, images = config.text, config.vision is not None
    if shape == "demo":  # half of it: both types of layers, and half the time
        text = dataclasses.replace(text, num_layers=6, layer_types=text.layer_types[:6])
    writer = PlanWriter(PlanBuilder("tensorrt_rtx", ("8.9",)), precision)
    index = writer.single(text, tmp_path, capacity=CAPACITY, images=images)
    assert index == open_plans(tmp_path)
    plan = index[SINGLE]
    assert plan.network_layers["ATTENTION"] == text.num_layers
    assert plan.network_layers["KV_CACHE_UPDATE"] == 2 * text.num_layers
    assert plan.network_layers["ROTARY_EMBEDDING"] == 2 * text.num_layers
    assert plan.network_layers["MATRIX_MULTIPLY"] == 4 * text.num_layers + 1
    assert plan.engine_layers["attention"] == text.num_layers * len(STEPS)
    assert [profile.name for profile in plan.profiles] == [name for name, *_ in STEPS]

    inputs = {tensor.name: tensor for tensor in plan.inputs}
    for name, _, shape_of in step_inputs(text, images=images):
        kind = "fp32" if name == "image_features" else "i32"
        dims = tuple(extent if isinstance(extent, int) else -1 for extent in shape_of)
        assert (inputs[name].dtype, inputs[name].shape) == (kind, dims)
    act = "fp16" if precision == "fp16" else "bf16"
    cache = (act, (-1, text.num_kv_heads, CAPACITY, text.head_dim))
    for layer in range(text.num_layers):
        names = CacheNames.of(layer)
        assert (inputs[names.past_key].dtype, inputs[names.past_key].shape) == cache
        assert Names.layer(layer, Names.GATE_UP) in inputs
    outputs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan.outputs}
    assert outputs.pop("logits") == ("fp32", (-1, -1, text.vocab_size))
    caches = [CacheNames.of(layer) for layer in range(text.num_layers)]
    assert outputs == dict.fromkeys((name for of in caches for name in (of.present_key, of.present_value)), cache)
    assert plan.num_bytes < 150e6  # no weights in it
