"""The stage around the pixels: order, pools, and prompts without images that wait for nobody."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from python_backends import contract, errors, pixels
from python_backends.image_processor import TritonPythonModel
from python_backends.pixels import (
    ImageLimits,
    ImageOptions,
    ImageProcessor,
    PanAndScan,
    UInt8,
    open_processor,
    pixels_of,
)
from tests.fake_triton import Request, TritonError
from tests.python_backends.stage_repository import IMAGE_SIZE, write_repository

LIMITS = ImageLimits(max_bytes=2**20, max_pixels=2**20)
OPTIONS = ImageOptions(16, 24, Image.Resampling.BILINEAR, PanAndScan(min_crop_size=16))


def png(width: int, height: int, seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def stage(tmp_path: Path) -> Any:
    repository = write_repository(tmp_path)
    stage = TritonPythonModel()
    stage.initialize({"model_repository": str(repository / "image_processor")})
    yield stage
    stage.finalize()


def ask(stage: TritonPythonModel, *images: Sequence[bytes]) -> list[Request]:
    requests = [Request(contract.MODELS[contract.IMAGE_PROCESSOR], {"image_bytes": encoded}) for encoded in images]
    stage.execute(requests)
    return requests


@pytest.fixture
def closed() -> Any:
    """A processor whose decoding waits until the test opens it."""
    gate = threading.Event()

    def wait(data: bytes, options: ImageOptions, limits: ImageLimits) -> UInt8:
        assert gate.wait(30)
        return pixels_of(data, options, limits)

    yield gate, wait
    gate.set()


def test_pictures_and_their_crops_keep_their_order() -> None:
    processor = ImageProcessor(OPTIONS, LIMITS)
    files = [png(90, 30, 1), png(20, 20, 2), png(30, 90, 3), png(5, 5, 4)]
    expected = np.concatenate([pixels_of(data, OPTIONS, LIMITS) for data in files])
    np.testing.assert_array_equal(processor(files), expected)
    assert len(expected) == 4 + 3 + 3
    processor.close()


def test_one_bad_picture_fails_the_prompt_with_its_reason() -> None:
    processor = ImageProcessor(OPTIONS, LIMITS)
    with pytest.raises(errors.InvalidImageError, match="truncated"):
        processor([png(20, 20), png(20, 20)[:-60]])
    processor.close()


def test_no_picture_gives_an_empty_tensor_of_the_models_size() -> None:
    processor = ImageProcessor(OPTIONS, LIMITS)
    found = processor([])
    assert (found.shape, found.dtype) == ((0, 3, 16, 24), np.uint8)
    processor.close()


def test_a_text_only_repository_serves_prompts_without_images(tmp_path: Path) -> None:
    processor = open_processor(write_repository(tmp_path, image=None))
    assert processor([]).shape == (0, 3, 0, 0)
    with pytest.raises(errors.ImagesNotSupportedError):
        processor([png(20, 20)])
    processor.close()


@pytest.mark.effect("max_image_bytes", "max_image_pixels", "pan_and_scan")
def test_the_configuration_sets_the_limits_and_the_crops(tmp_path: Path) -> None:
    settings = {"max_image_bytes": 10**6, "max_image_pixels": 256 * 512, "pan_and_scan": True}
    processor = open_processor(write_repository(tmp_path, settings=settings))
    assert processor([png(512, 256)]).shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)
    for data in (png(512, 257), png(2, 2) + bytes(10**6)):
        with pytest.raises(errors.ImageTooLargeError):
            processor([data])
    processor.close()


def test_the_configured_limit_may_exceed_pillows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    processor = open_processor(write_repository(tmp_path))
    assert len(processor([png(20, 20)])) == 1
    processor.close()


def test_the_model_answers_each_request_of_a_batch_by_itself(stage: TritonPythonModel) -> None:
    good, bad, empty = (request.response() for request in ask(stage, [png(9, 9), png(7, 8)], [b"no picture"], []))
    assert good.tensors["pixels"].shape == (1, 2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert good.tensors["pixels"].dtype == np.uint8
    assert (bad.error.code, bad.error.message.partition(":")[0]) == (TritonError.INVALID_ARG, "invalid_image")
    assert empty.tensors["pixels"].shape == (1, 0, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_a_prompt_without_images_does_not_wait_for_its_neighbours(
    stage: TritonPythonModel, closed: tuple[threading.Event, Callable[..., UInt8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, slow = closed
    monkeypatch.setattr(pixels, "pixels_of", slow)
    pictures, text = ask(stage, [png(9, 9)], [])
    assert text.answered
    assert not pictures.answered
    gate.set()
    assert pictures.response().tensors["pixels"].shape[1] == 1


def test_pictures_of_one_prompt_are_decoded_beside_one_another(
    stage: TritonPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = threading.Barrier(2, timeout=30)

    def meet(data: bytes, options: ImageOptions, limits: ImageLimits) -> UInt8:
        meeting.wait()  # breaks unless two are inside
        return pixels_of(data, options, limits)

    monkeypatch.setattr(pixels.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(pixels, "pixels_of", meet)
    processor = ImageProcessor(OPTIONS, LIMITS)
    assert len(processor([png(9, 9), png(8, 8)])) == 2
    processor.close()


def test_an_unexpected_failure_reaches_the_client_without_its_traceback(
    stage: TritonPythonModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> UInt8:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(pixels, "pixels_of", fail)
    (request,) = ask(stage, [png(9, 9)])
    found = request.response()
    assert found.error is not None
    assert found.error.code == TritonError.INTERNAL
    assert "secret" not in found.error.message
    assert "a secret" in caplog.text


def test_more_pictures_than_may_wait_are_refused_at_once(
    tmp_path: Path, closed: tuple[threading.Event, Callable[..., UInt8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, slow = closed
    monkeypatch.setattr(pixels, "pixels_of", slow)
    repository = write_repository(tmp_path, settings={"max_batch_size": 1, "max_queue": 2})
    stage: Any = TritonPythonModel()
    stage.initialize({"model_repository": str(repository / "image_processor")})
    *waiting, refused = ask(stage, *[[png(9, 9)]] * 4)
    assert refused.response().error.message.startswith("overloaded: ")
    gate.set()
    assert all(request.response().error is None for request in waiting)
    (again,) = ask(stage, [png(9, 9)])
    assert again.response().error is None
    stage.finalize()
