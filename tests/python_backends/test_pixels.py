"""Pixel for pixel what transformers' own processor (PIL backend) makes of the same file."""

from __future__ import annotations

import base64
import functools
import io
import json
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from python_backends.errors import ArtifactError, ImageTooLargeError, InvalidImageError
from python_backends.pixels import (
    ImageLimits,
    ImageOptions,
    PanAndScan,
    UInt8,
    encoded_bytes,
    image_size,
    load_rgb,
    pixels_of,
    read_options,
)
from tests.paths import DEMO_CHECKPOINT

LIMITS = ImageLimits(max_bytes=2**24, max_pixels=2**24)
OPTIONS = ImageOptions(height=48, width=40, resample=Image.Resampling.BILINEAR, pan_and_scan=None)
CROPPING = PanAndScan(min_crop_size=16, max_num_crops=4, min_ratio_to_activate=1.2)
ORIENTATION = 0x0112


@functools.cache
def processor() -> Any:
    return Gemma3ImageProcessorPil.from_pretrained(DEMO_CHECKPOINT, size={"height": 48, "width": 40})


def expected_values(data: bytes, cropping: PanAndScan | None = None) -> Any:
    """[1 + crops, 3, H, W] float32, from the file's bytes as transformers takes them."""
    picture = load_image(base64.b64encode(data).decode())
    options = {f"pan_and_scan_{name}": value for name, value in vars(cropping or PanAndScan()).items()}
    found = processor()(picture, do_pan_and_scan=cropping is not None, return_tensors="np", **options)
    return found["pixel_values"]


def assert_equal_to_transformers(data: bytes, cropping: PanAndScan | None = None) -> UInt8:
    options = ImageOptions(OPTIONS.height, OPTIONS.width, OPTIONS.resample, cropping)
    pixels = pixels_of(data, options, LIMITS)
    expected = expected_values(data, cropping)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.rint((expected * 0.5 + 0.5) * 255))
    np.testing.assert_allclose((pixels.astype(np.float32) / 255 - 0.5) / 0.5, expected, rtol=0, atol=1e-6)
    return pixels


def noise(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """Random contents in any of Pillow's modes."""
    generator = np.random.default_rng(seed)
    if mode.startswith("I;16"):
        return Image.fromarray(generator.integers(0, 2**16, (height, width), dtype=np.uint16))
    # Soft shapes under the noise, so that lossy formats have something to keep.
    small = generator.integers(0, 256, (3, 3, 4), dtype=np.uint8)
    picture = Image.fromarray(small, "RGBA" if mode in {"RGBA", "LA", "PA"} else "CMYK").resize((width, height))
    if mode == "P":
        return picture.convert("RGB").quantize(64)
    return picture.convert(mode) if mode != "LA" else picture.convert("RGBA").convert("LA")


def saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def oriented(form: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return saved(noise("RGB", 31, 17), form, exif=exif)


def palette_with_alpha(form: str) -> bytes:
    picture = noise("P", 33, 21)
    return saved(picture, form, transparency=3)


def sixteen_bit_rgb() -> bytes:
    """Pillow writes none: 16 bits a channel, unfiltered rows."""
    rows = np.random.default_rng(5).integers(0, 2**16, (20, 30, 3)).astype(">u2")
    return png_file(30, 20, b"".join(b"\0" + row.tobytes() for row in rows), bits=16, colour=2)


def png_file(width: int, height: int, rows: bytes, *, bits: int, colour: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def animation(form: str) -> bytes:
    frames = [
        noise("RGB", 40, 30, seed).quantize(32) if form == "GIF" else noise("RGB", 40, 30, seed) for seed in (1, 2)
    ]
    return saved(frames[0], form, save_all=True, append_images=frames[1:])


MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["P", "L"],
    "BMP": ["1", "L", "P", "RGB"],
    "TIFF": ["1", "L", "RGB", "RGBA", "CMYK", "I;16", "LAB"],
}
RGB, SECOND = noise("RGB", 45, 31), noise("RGB", 45, 31, seed=1)
FILES: dict[str, bytes] = {
    **{f"{form} {mode}": saved(noise(mode, 45, 31), form) for form, modes in MODES.items() for mode in modes},
    **{f"{form} orientation {n}": oriented(form, n) for form in ("JPEG", "PNG", "WEBP") for n in range(1, 9)},
    "PNG palette, one colour transparent": palette_with_alpha("PNG"),
    "PNG palette, alpha for each colour": saved(noise("P", 33, 21), "PNG", transparency=bytes(range(64))),
    "PNG grey, one shade transparent": saved(noise("L", 33, 21), "PNG", transparency=7),
    "PNG 16-bit RGB": sixteen_bit_rgb(),
    "GIF transparent": palette_with_alpha("GIF"),
    "GIF animated": animation("GIF"),
    "PNG animated": animation("PNG"),
    "WEBP animated": animation("WEBP"),
    "WEBP lossless": saved(noise("RGBA", 45, 31), "WEBP", lossless=True),
    "JPEG progressive": saved(RGB, "JPEG", progressive=True, subsampling=2),
    "JPEG of several pictures": saved(RGB, "MPO", save_all=True, append_images=[SECOND]),
    "TIFF deflated": saved(RGB, "TIFF", compression="tiff_adobe_deflate"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_the_processors_pixels(name: str) -> None:
    assert_equal_to_transformers(FILES[name])


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(0, 99),
    st.booleans(),
)
def test_any_size_and_mode_gives_the_processors_pixels(
    mode: str, width: int, height: int, seed: int, cropping: bool
) -> None:
    data = saved(noise(mode, width, height, seed), "PNG")
    pixels = assert_equal_to_transformers(data, CROPPING if cropping else None)
    assert len(pixels) == 1 + (len(CROPPING.boxes(width, height)) if cropping else 0)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([PanAndScan(), CROPPING, PanAndScan(4, 4, 1.0)]))
def test_crops_are_the_processors_and_their_number_survives_rotation(
    width: int, height: int, cropping: PanAndScan
) -> None:
    picture = np.broadcast_to(np.zeros((1, 1, 1), np.uint8), (3, height, width))
    options = {f"pan_and_scan_{name}": value for name, value in vars(cropping).items()}
    expected = [crop.shape[:0:-1] for crop in processor().pan_and_scan(picture, **options)]
    boxes = cropping.boxes(width, height)
    assert [(right - left, bottom - top) for left, top, right, bottom in boxes] == expected
    assert sum((right - left) * (bottom - top) for left, top, right, bottom in boxes) in {0, width * height}
    assert len(cropping.boxes(height, width)) == len(boxes)


@pytest.mark.parametrize("orientation", [1, 6])
def test_an_orientation_is_applied_before_cropping(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = saved(noise("RGB", 120, 40), "JPEG", exif=exif)
    assert len(assert_equal_to_transformers(data, CROPPING)) == 4


def test_exif_that_cannot_be_read_leaves_the_picture_as_it_is() -> None:
    plain = saved(noise("RGB", 31, 17), "JPEG")
    damaged = saved(noise("RGB", 31, 17), "JPEG", exif=b"Exif\0\0this is no TIFF header")
    assert damaged != plain
    np.testing.assert_array_equal(pixels_of(damaged, OPTIONS, LIMITS), pixels_of(plain, OPTIONS, LIMITS))


def bilevel_png(side: int) -> bytes:
    return png_file(side, side, bytes((side // 8 + 1) * side), bits=1, colour=0)


def test_an_enormous_png_is_refused_from_its_header() -> None:
    data = bilevel_png(30_000)
    start = time.perf_counter()
    with pytest.raises(ImageTooLargeError, match="pixels"):
        load_rgb(data, ImageLimits(2**26, 2**26))
    assert time.perf_counter() - start < 0.05


def webp_header(side: int) -> bytes:
    """The header of an extended WebP whose canvas the decoder would allocate at once."""
    size = (side - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size + size


@pytest.mark.parametrize(
    "data",
    [
        bilevel_png(5000),
        bilevel_png(10_000),
        webp_header(16_383),
        b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 60_000, 60_000, 1, 24, 0) + bytes(20),
        b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0\2\2L\1\0;",
    ],
    ids=["png-above-the-limit", "png-above-pillows-limit", "webp", "bmp", "gif"],
)
def test_a_picture_beyond_the_limit_is_refused_from_its_header(data: bytes) -> None:
    start = time.perf_counter()
    with pytest.raises(ImageTooLargeError):
        image_size(data, LIMITS)
    assert time.perf_counter() - start < 0.05


def test_the_limit_may_be_used_up() -> None:
    data = saved(noise("L", 40, 30), "PNG")
    assert image_size(data, ImageLimits(len(data), 1200)) == (40, 30)
    with pytest.raises(ImageTooLargeError, match=r"40 × 30.*1,199 pixels"):
        image_size(data, ImageLimits(len(data), 1199))
    with pytest.raises(ImageTooLargeError, match="bytes"):
        image_size(data, ImageLimits(len(data) - 1, 1200))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 200), (200, 1)])
def test_small_and_narrow_pictures_are_read(width: int, height: int) -> None:
    assert_equal_to_transformers(saved(noise("RGB", width, height), "PNG"))


@pytest.mark.parametrize(("width", "height"), [(1, 201), (100_000, 1)])
def test_absurdly_long_pictures_are_refused(width: int, height: int) -> None:
    with pytest.raises(InvalidImageError, match="200 times"):
        image_size(saved(noise("L", width, height), "PNG"), LIMITS)


@pytest.mark.parametrize(
    "name", ["PNG RGB", "JPEG RGB", "JPEG progressive", "WEBP RGB", "GIF P", "BMP RGB", "TIFF RGB"]
)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(name: str, share: float) -> None:
    data = FILES[name]
    with pytest.raises(InvalidImageError):
        pixels_of(data[: int(len(data) * share)], OPTIONS, LIMITS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"P6 1 1 255\nabc",
    ],
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidImageError):
        image_size(data, LIMITS)


@pytest.mark.parametrize("form", ["ICO", "TGA", "PPM", "JPEG2000", "AVIF", "PCX", "SGI"])
def test_formats_beyond_the_list_stay_shut(form: str) -> None:
    with pytest.raises(InvalidImageError, match="PNG, JPEG, WEBP, GIF, BMP, TIFF"):
        image_size(saved(noise("RGB", 16, 16), form), LIMITS)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    data = bytearray(FILES[draw(st.sampled_from(sorted(FILES)))])
    for _ in range(draw(st.integers(1, 8))):
        place = draw(st.integers(0, min(len(data) - 1, draw(st.sampled_from([30, 200, 10**6])))))
        data[place] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(1, len(data)))]) if draw(st.booleans()) else bytes(data)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about what it repairs
@settings(deadline=None, max_examples=400)
@given(st.one_of(damaged_files(), st.binary(max_size=200)))
def test_damaged_files_give_pixels_or_a_refusal_and_nothing_else(data: bytes) -> None:
    try:
        pixels = pixels_of(data, OPTIONS, LIMITS)
    except InvalidImageError:
        return
    assert pixels.shape == (1, 3, OPTIONS.height, OPTIONS.width)


@settings(deadline=None)
@given(st.sampled_from(sorted(FILES)), st.booleans())
def test_encoded_bytes_and_base64_are_told_apart(name: str, as_text: bool) -> None:
    data = FILES[name]
    assert encoded_bytes(base64.b64encode(data) if as_text else data, LIMITS) == data


def write(folder: Path, name: str, values: Any) -> Path:
    (folder / name).write_text(json.dumps(values), encoding="utf-8")
    return folder


SIZE = {"size": {"height": 48, "width": 40}}


def test_options_come_from_either_form_of_the_file(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {**SIZE, "resample": 3, "pan_and_scan_min_crop_size": None})
    write(tmp_path, "processor_config.json", {"image_seq_length": 64})
    expected = ImageOptions(48, 40, Image.Resampling.BICUBIC, PanAndScan())
    assert read_options(tmp_path, pan_and_scan=True) == expected
    write(tmp_path, "processor_config.json", {"image_processor": {**SIZE, "pan_and_scan_min_crop_size": 99}})
    found = read_options(tmp_path, pan_and_scan=True)
    assert found == ImageOptions(48, 40, Image.Resampling.BILINEAR, PanAndScan(min_crop_size=99))
    assert read_options(tmp_path, pan_and_scan=False).pan_and_scan is None


BAD_OPTIONS: list[Any] = [
    [],
    {},
    {"size": 3},
    {"size": {"height": 48}},
    {**SIZE, "resample": 17},
    {**SIZE, "pan_and_scan_min_crop_size": 2},
]


@pytest.mark.parametrize("values", BAD_OPTIONS)
def test_options_that_are_not_gemmas_are_an_artifact_error(tmp_path: Path, values: Any) -> None:
    with pytest.raises(ArtifactError):
        read_options(write(tmp_path, "preprocessor_config.json", values), pan_and_scan=True)


def test_no_options_are_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="wicore build"):
        read_options(tmp_path, pan_and_scan=False)
