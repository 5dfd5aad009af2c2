"""One call of the runtime for the images of several requests, each of which gets its own embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends import contract, vision_encoder
from python_backends.errors import ArtifactError, ImagesNotSupportedError, InternalError, InvalidImageError
from python_backends.runtime.base import Float32, UInt8, VisionRuntime
from python_backends.vision_encoder import TritonPythonModel, encode_together, open_runtime
from tests.fake_triton import Request, TritonError
from tests.python_backends.stage_repository import write_repository

SHAPE = (3, 4, 5)
TOKENS, WIDTH = 2, 6


class Averaging:
    """A vision runtime whose embeddings tell the image they come from: its mean, in every place."""

    image_shape = SHAPE

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.closed = False

    def encode(self, pixels: UInt8) -> Float32:
        assert pixels.dtype == np.uint8
        self.batches.append(len(pixels))
        means = pixels.mean(axis=(1, 2, 3), dtype=np.float32)
        return np.broadcast_to(means[:, None, None], (len(pixels), TOKENS, WIDTH)).astype(np.float32)

    def close(self) -> None:
        self.closed = True


class Broken(Averaging):
    def encode(self, pixels: UInt8) -> Float32:
        raise InternalError("the device is gone")


def images(count: int, seed: int = 0) -> UInt8:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_every_request_gets_the_embeddings_of_its_own_images(counts: list[int]) -> None:
    runtime = Averaging()
    batches = [images(count, seed) for seed, count in enumerate(counts)]
    found = encode_together(runtime, batches)
    assert runtime.batches == [sum(counts)]
    for features, pixels in zip(found, batches, strict=True):
        np.testing.assert_array_equal(features, Averaging().encode(pixels))


def test_a_text_only_model_refuses_images() -> None:
    with pytest.raises(ImagesNotSupportedError):
        encode_together(None, [images(1)])


def test_pixels_of_another_size_are_refused_by_their_size() -> None:
    with pytest.raises(InvalidImageError, match=r"\(3, 9, 9\).*\(3, 4, 5\)"):
        encode_together(Averaging(), [np.zeros((1, 3, 9, 9), np.uint8)])


def test_a_text_only_repository_has_no_runtime_and_one_with_images_needs_its_files(tmp_path: Path) -> None:
    text, image = tmp_path / "text", tmp_path / "image"
    assert open_runtime(write_repository(text, image=None)) is None
    with pytest.raises(ArtifactError, match="vision_encoder"):
        open_runtime(write_repository(image))


def serve(runtime: VisionRuntime | None, monkeypatch: pytest.MonkeyPatch) -> TritonPythonModel:
    monkeypatch.setattr(vision_encoder, "open_runtime", lambda _: runtime)
    model = TritonPythonModel()
    model.initialize({"model_repository": "anywhere/vision_encoder"})
    return model


def ask(model: TritonPythonModel, *batches: UInt8) -> list[Any]:
    requests = [Request(contract.MODELS[contract.VISION_ENCODER], {"pixels": pixels}) for pixels in batches]
    return model.execute(requests)


def test_the_model_encodes_a_batch_of_requests_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Averaging()
    model = serve(runtime, monkeypatch)
    responses = ask(model, images(1, 1), images(2, 2), images(1, 3))
    assert runtime.batches == [4]
    assert [response.tensors["image_features"].shape for response in responses] == [
        (1, TOKENS, WIDTH),
        (2, TOKENS, WIDTH),
        (1, TOKENS, WIDTH),
    ]
    np.testing.assert_array_equal(responses[2].tensors["image_features"], Averaging().encode(images(1, 3)))
    model.finalize()
    assert runtime.closed


@pytest.mark.parametrize(("runtime", "code"), [(None, "images_not_supported"), (Broken(), "internal")])
def test_every_request_of_a_failed_call_is_told_why(
    runtime: VisionRuntime | None, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses = ask(serve(runtime, monkeypatch), images(1), images(2))
    assert [response.error.message.partition(":")[0] for response in responses] == [code, code]
    wanted = TritonError.INTERNAL if code == "internal" else TritonError.INVALID_ARG
    assert {response.error.code for response in responses} == {wanted}
