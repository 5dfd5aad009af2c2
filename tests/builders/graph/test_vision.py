"""The vision encoder graph computes what transformers' tower, pooling and projector compute."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from builders.checkpoint import open_checkpoint
from builders.graph import write_vision_encoder
from builders.quantize import Precision
from python_backends.errors import BuildError
from tests.checkpoints import IMAGE_FAMILIES, IMAGE_NAMES, checkpoint, tiny
from tests.driver import FP32, artefacts, vision
from tests.reference import normalized, reference


def pictures(name: str, count: int) -> np.ndarray:
    side = open_checkpoint(checkpoint(name)).config.vision.image_size
    return np.random.default_rng(4).integers(0, 256, (count, 3, side, side), np.uint8)


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_features_equal_transformers(name):
    pixels = pictures(name, 3)
    wanted = reference(checkpoint(name)).image_features(pixels)
    np.testing.assert_allclose(vision(checkpoint(name)).encode(pixels), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@pytest.mark.parametrize("name", ["fp16", "int8", "int4"])
def test_features_of_other_precisions_point_the_same_way(family, name):
    pixels = pictures(family, 2)
    wanted = reference(tiny(family)).image_features(pixels)
    found = vision(tiny(family), Precision(name)).encode(pixels)
    cosine = (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert cosine.min() > 0.999


def test_every_channel_value_is_normalised_as_the_image_processor_does(tmp_path):
    path = artefacts(tiny("4b"), FP32) / "vision_encoder.onnx"
    model = onnx.load(path)
    (patches,) = (node for node in model.graph.node if node.op_type == "Conv")
    kept = model.graph.node[: list(model.graph.node).index(patches)]
    graph = onnx.helper.make_graph(
        kept,
        "normalise",
        model.graph.input,
        [onnx.helper.make_tensor_value_info(patches.input[0], onnx.TensorProto.FLOAT, None)],
        [item for item in model.graph.initializer if not item.external_data],
    )
    part = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.resize(np.arange(256, dtype=np.uint8), (1, 3, 32, 32))
    (found,) = session.run(None, {"pixels": pixels})
    np.testing.assert_array_equal(found, normalized(pixels).numpy())


def test_reference_normalisation_is_that_of_the_processor():
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    pixels = np.resize(np.arange(256, dtype=np.uint8), (3, 32, 32))
    processor = Gemma3ImageProcessorPil(size={"height": 32, "width": 32}, do_resize=False, do_convert_rgb=False)
    found = processor([pixels], input_data_format="channels_first", return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(np.asarray(found[0]), normalized(pixels).numpy())


def test_a_text_only_checkpoint_has_no_vision_encoder(tmp_path):
    with pytest.raises(BuildError, match="text-only"):
        write_vision_encoder(open_checkpoint(tiny("1b")), FP32, tmp_path)
