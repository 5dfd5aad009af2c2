"""The vision encoder's plan holds its weights, attends in fused kernels, and is what Triton's contract says."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from builders.checkpoint import Checkpoint, open_checkpoint
from builders.gpu_plans import IMAGES, PlanWriter
from builders.plan import PlanBuilder
from builders.random_checkpoint import shape_config, write_random_checkpoint
from python_backends import contract
from python_backends.runtime.gpu.plans import VISION, PlanIndex
from tests.checkpoints import DEMO, scratch
from tests.paths import MODEL_REPOSITORY

LAYERS = 2
TYPES = {"TYPE_UINT8": "u8", "TYPE_FP32": "fp32"}


@functools.cache
def published_tower() -> Checkpoint:
    """Two layers of the published tower at 896×896, before a decoder that hardly weighs anything."""
    config = shape_config("4b", 1)
    text = {**config["text_config"], "vocab_size": 1024, "intermediate_size": 64}
    vision = {**config["vision_config"], "num_hidden_layers": LAYERS}
    ids = {"boi_token_index": 1021, "eoi_token_index": 1022, "image_token_index": 1023}
    folder = scratch() / "published-tower"
    write_random_checkpoint(folder, {**config, **ids, "text_config": text, "vision_config": vision})
    return open_checkpoint(folder)


def build(checkpoint: Checkpoint, precision: Any, folder: Path, *capabilities: str) -> PlanIndex:
    return PlanWriter(PlanBuilder("tensorrt_rtx", capabilities), precision).vision(checkpoint, folder)


@pytest.mark.parametrize(("precision", "layer_bytes"), [("bf16", 2), ("fp16", 2), ("fp8", 1), ("int8", 1), ("int4", 1)])
def test_the_published_tower_has_fused_attention_and_products_of_its_weights(
    tmp_path: Path, precision: Any, layer_bytes: int
) -> None:
    checkpoint = published_tower()
    vision = checkpoint.config.vision
    assert vision is not None
    plan = build(checkpoint, precision, tmp_path, "8.9")[VISION]
    assert plan.network_layers["ATTENTION"] == LAYERS
    assert plan.engine_layers["attention"] == LAYERS * len(IMAGES)
    assert plan.network_layers["MATRIX_MULTIPLY"] == 4 * LAYERS + 1
    matrices = LAYERS * vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    assert layer_bytes * matrices < plan.num_bytes < (layer_bytes + 1) * matrices + 60e6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plans.json", "vision_encoder.plan"]


@pytest.mark.parametrize("capabilities", [(), ("8.9",)])
def test_inputs_and_outputs_are_the_contracts(tmp_path: Path, capabilities: tuple[str, ...]) -> None:
    checkpoint = open_checkpoint(DEMO)
    vision = checkpoint.config.vision
    assert vision is not None
    plan = build(checkpoint, "bf16", tmp_path, *capabilities)[VISION]
    model = contract.MODELS[contract.VISION_ENCODER]
    for wanted, found in zip(model.inputs + model.outputs, plan.inputs + plan.outputs, strict=True):
        assert (found.name, found.dtype) == (wanted.name, TYPES[wanted.dtype])
        assert found.shape[0] == -1  # images of a batch
        assert len(found.shape) == 1 + len(wanted.dims)
        for size, allowed in zip(found.shape[1:], wanted.dims, strict=True):
            assert size > 0
            assert allowed in {size, -1}
    assert plan.inputs[0].shape[1:] == (3, vision.image_size, vision.image_size)
    assert plan.outputs[0].shape[1:] == (vision.tokens_per_image, checkpoint.config.text.hidden_size)


def test_triton_may_batch_what_the_plan_takes() -> None:
    folder = MODEL_REPOSITORY / contract.VISION_ENCODER
    files = folder / "config.pbtxt", folder / "configs" / "tensorrt.pbtxt"
    python, plan = (text_format.Parse(file.read_text(), model_config_pb2.ModelConfig()) for file in files)
    assert (plan.name, plan.platform) == (contract.VISION_ENCODER, "tensorrt_plan")
    assert plan.max_batch_size == python.max_batch_size == IMAGES[-1][-1]
    assert plan.dynamic_batching == python.dynamic_batching
    assert plan.response_cache == python.response_cache
