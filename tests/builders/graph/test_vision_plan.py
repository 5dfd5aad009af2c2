"""The vision encoder in the standard dialect computes what transformers' tower, pooling and projector compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from builders.checkpoint import open_checkpoint
from builders.graph.vision_plan import write_vision_graph
from python_backends.errors import BuildError
from tests.builders.graph.standard_dialect import element_type
from tests.checkpoints import IMAGE_NAMES, checkpoint, tiny
from tests.reference import reference


def encode(name: str, folder: Path, precision: Any, pixels: Any) -> Any:
    activation = "fp16" if precision == "fp16" else "fp32"  # ONNX Runtime has no bfloat16 on the CPU
    path = write_vision_graph(open_checkpoint(checkpoint(name)), precision, folder, activation=activation)
    onnx.checker.check_model(str(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (features,) = session.run(["image_features"], {"pixels": pixels})
    return features


def pictures(name: str, count: int) -> np.ndarray:
    side = open_checkpoint(checkpoint(name)).config.vision.image_size
    return np.random.default_rng(4).integers(0, 256, (count, 3, side, side), np.uint8)


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_features_equal_transformers(tmp_path, name):
    pixels = pictures(name, 3)
    wanted = reference(checkpoint(name)).image_features(pixels)
    np.testing.assert_allclose(encode(name, tmp_path, "fp32", pixels), wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", IMAGE_NAMES)
@pytest.mark.parametrize(("precision", "least"), [("fp16", 0.9999), ("fp8", 0.99), ("int8", 0.999), ("int4", 0.999)])
def test_features_of_other_precisions_point_the_same_way(tmp_path, name, precision, least):
    pixels = pictures(name, 2)
    wanted = reference(checkpoint(name)).image_features(pixels)
    found = encode(name, tmp_path, precision, pixels)
    cosine = (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert cosine.min() > least


@pytest.mark.parametrize(("precision", "matrices"), [("bf16", "BFLOAT16"), ("fp8", "FLOAT8E4M3FN"), ("int4", "INT8")])
def test_weights_are_stored_in_the_precision_and_inputs_and_outputs_stay(tmp_path, precision, matrices):
    path = write_vision_graph(open_checkpoint(tiny("4b")), precision, tmp_path)
    assert (element_type(path, "pixels"), element_type(path, "image_features")) == ("UINT8", "FLOAT")
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {item.name: onnx.TensorProto.DataType.Name(item.data_type) for item in graph.initializer}
    assert kinds["vision.encoder.layers.1.mlp.fc1.weight"] == matrices


def test_a_text_only_checkpoint_has_no_vision_encoder(tmp_path):
    with pytest.raises(BuildError, match="text-only"):
        write_vision_graph(open_checkpoint(tiny("1b")), "bf16", tmp_path)
