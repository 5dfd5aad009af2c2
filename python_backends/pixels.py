"""Encoded pictures → uint8 pixels, equal to what transformers' own Gemma-3 processor (PIL backend) resizes.

A picture is loaded as `transformers.image_utils.load_image` loads it: first frame, EXIF orientation applied, then
Pillow's ``convert("RGB")`` with its ways (an alpha channel is dropped, not laid on white; greyscale of 16 bits is
clipped at 255, not scaled). It is resized, and cropped, as `Gemma3ImageProcessorPil` does, whose `pixel_values` are
``(pixels / 255 − 0.5) / 0.5``; the vision graph computes those. Everything that can be refused is refused from the
header, before a pixel is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
import json
import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from python_backends import config, contract, manifest
from python_backends.errors import ArtifactError, ImagesNotSupportedError, ImageTooLargeError, InvalidImageError

UInt8 = NDArray[np.uint8]

# Imported here, so that the first picture does not make Pillow import all its plug-ins: the others stay shut (one of
# them starts PostScript's interpreter).
PLUGINS = (
    PngImagePlugin.PngImageFile,
    JpegImagePlugin.JpegImageFile,
    WebPImagePlugin.WebPImageFile,
    GifImagePlugin.GifImageFile,
    BmpImagePlugin.BmpImageFile,
    TiffImagePlugin.TiffImageFile,
)
FORMATS = tuple(plugin.format for plugin in PLUGINS)
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_ASPECT_RATIO = 200
MAX_THREADS = 4
"""Pictures decoded at once: each may hold several bytes for each of its pixels, so this bounds memory too."""

# A picture between Pillow's limit and twice that limit would only be warned about.
warnings.simplefilter("error", Image.DecompressionBombWarning)


@dataclass(frozen=True)
class ImageLimits:
    """What one picture may cost."""

    max_bytes: int
    """Encoded bytes."""
    max_pixels: int
    """Width × height."""


@dataclass(frozen=True)
class PanAndScan:
    """Cropping of long pictures (arXiv 2503.19786, section 2.1); defaults of `Gemma3Processor`."""

    min_crop_size: int = 256
    """Shortest side of a crop, in pixels of the picture."""
    max_num_crops: int = 4
    min_ratio_to_activate: float = 1.2
    """Longer side over shorter side from which a picture is cropped."""

    def boxes(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        """Crops of a picture as (left, top, right, bottom), row by row; none for a picture that is not long.

        Their number is the same for ``height × width``, so it can be told before the EXIF orientation is known.
        Source: `Gemma3ImageProcessorPil.pan_and_scan`.
        """
        long, short = max(width, height), min(width, height)
        if long / short < self.min_ratio_to_activate:
            return []
        count = min(math.floor(long / short + 0.5), long // self.min_crop_size)
        count = min(max(count, 2), self.max_num_crops)
        across, down = (count, 1) if width >= height else (1, count)
        crop_width, crop_height = math.ceil(width / across), math.ceil(height / down)
        if min(crop_width, crop_height) < self.min_crop_size:
            return []
        tops, lefts = range(0, crop_height * down, crop_height), range(0, crop_width * across, crop_width)
        return [
            (left, top, min(left + crop_width, width), min(top + crop_height, height))
            for top, left in itertools.product(tops, lefts)
        ]


@dataclass(frozen=True)
class ImageOptions:
    """How the checkpoint wants its pictures; read from its processor files."""

    height: int
    width: int
    resample: Image.Resampling
    pan_and_scan: PanAndScan | None
    """None: pictures are not cropped."""


def read_options(folder: Path, *, pan_and_scan: bool) -> ImageOptions:
    """Read ``processor_config.json`` (transformers 5) or ``preprocessor_config.json`` of a stage's artefact folder.

    Raises:
        ArtifactError: missing, not JSON, or not Gemma-3's. (`wicore build` has checked mean and deviation.)
    """
    values = _processor_values(folder)
    try:
        options = ImageOptions(
            height=int(values["size"]["height"]),
            width=int(values["size"]["width"]),
            resample=Image.Resampling(values.get("resample", Image.Resampling.BILINEAR)),
            pan_and_scan=_pan_and_scan(values) if pan_and_scan else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the image processor's configuration in {folder} is not Gemma-3's: {error!r}") from error
    return options


def _processor_values(folder: Path) -> dict[str, Any]:
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values = values if name.startswith("pre") else values.get("image_processor")
        except (ValueError, AttributeError) as error:
            raise ArtifactError(f"{path} cannot be read; run `wicore build` again: {error}") from error
        if isinstance(values, dict):
            return values
    raise ArtifactError(f"no processor_config.json or preprocessor_config.json in {folder}; run `wicore build` again")


def _pan_and_scan(values: dict[str, Any]) -> PanAndScan:
    """Null in the published files, where the processor's own numbers apply."""
    given = {field.name: values.get(f"pan_and_scan_{field.name}") for field in fields(PanAndScan)}
    options = PanAndScan(**{name: value for name, value in given.items() if value is not None})
    if options.min_crop_size < options.max_num_crops:  # a last crop could be empty
        raise ValueError(f"crops of {options.min_crop_size} pixels")
    return options


def encoded_bytes(value: bytes, limits: ImageLimits) -> bytes:
    """A picture as the user sent it (encoded bytes, base64 text, or a base64 data URL) → its encoded bytes.

    The forms cannot be confused: no base64 text that starts with one of the signatures decodes to a picture.

    Raises:
        InvalidImageError: empty, an address to fetch, or neither of these forms.
        ImageTooLargeError: more bytes than the limit.
    """
    if not value:
        raise InvalidImageError("the image is empty (0 bytes)")
    if not value.startswith(MAGIC):
        value = _from_base64(value, limits)
    _check_bytes(len(value), limits)
    return value


def _from_base64(value: bytes, limits: ImageLimits) -> bytes:
    start = value[:64].lstrip().lower()
    if start.startswith((b"http:", b"https:", b"file:", b"ftp:", b"s3:")):
        raise InvalidImageError("the server fetches nothing; send the image's bytes, in base64 or as a data URL")
    if start.startswith(b"data:"):
        kind, _, value = value.partition(b",")
        if not kind.rstrip().lower().endswith(b";base64"):
            raise InvalidImageError("a data URL must hold base64: data:image/png;base64,…")
    _check_bytes(len(value) * 3 // 4 - 2, limits)
    text = b"".join(value.split()).translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise InvalidImageError(
            f"the image is neither a {', '.join(FORMATS)} file nor base64 of one ({error})"
        ) from error


def _check_bytes(count: int, limits: ImageLimits) -> None:
    if count > limits.max_bytes:
        raise ImageTooLargeError(f"the image has {count:,} bytes; this server takes at most {limits.max_bytes:,}")


def image_size(data: bytes, limits: ImageLimits) -> tuple[int, int]:
    """Width and height from the header, before EXIF orientation; no pixel is decoded.

    Raises:
        InvalidImageError: not a picture in one of `FORMATS`, or absurdly long.
        ImageTooLargeError: more pixels than the limit.
    """
    with _open(data, limits) as image:
        return image.size


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    _check_bytes(len(data), limits)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"the image is beyond {limits.max_pixels:,} pixels; send a smaller one") from error
    except Exception as error:  # Pillow's parsers raise whatever they stumble over
        raise InvalidImageError(f"not a readable {', '.join(FORMATS)} file") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"the image is {width} × {height}; this server takes at most {limits.max_pixels:,} pixels"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InvalidImageError(
            f"the image is {width} × {height}; one side may be at most {MAX_ASPECT_RATIO} times the other"
        )
    return image


def allow_pixels(limits: ImageLimits) -> None:
    """Let Pillow's own, process-wide limit not be below the configured one."""
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, limits.max_pixels)


def load_rgb(data: bytes, limits: ImageLimits) -> Image.Image:
    """Decode a picture upright as RGB.

    Raises:
        InvalidImageError: truncated or damaged.
        ImageTooLargeError: see `image_size`.
    """
    with _open(data, limits) as image:
        try:
            image.load()
            return _upright(image).convert("RGB")
        except Exception as error:
            raise InvalidImageError(f"the {image.format} image is truncated or damaged: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be parsed says nothing about the orientation
        return image


def pixels_of(data: bytes, options: ImageOptions, limits: ImageLimits) -> UInt8:
    """One encoded picture → [1 + crops, 3, H, W] uint8 RGB: the whole picture, then its crops row by row.

    Raises:
        InvalidImageError, ImageTooLargeError: see `load_rgb`.
    """
    image = load_rgb(data, limits)
    boxes = options.pan_and_scan.boxes(*image.size) if options.pan_and_scan else []
    pixels = np.empty((1 + len(boxes), 3, options.height, options.width), dtype=np.uint8)
    for target, part in zip(pixels, itertools.chain([image], map(image.crop, boxes)), strict=True):
        resized = part.resize((options.width, options.height), resample=options.resample)
        target[:] = np.asarray(resized).transpose(2, 0, 1)
    return pixels


class ImageProcessor:
    """Decodes pictures beside one another; Pillow lets go of the interpreter lock while it works.

    ``options`` is None for a text-only model.
    """

    def __init__(self, options: ImageOptions | None, limits: ImageLimits) -> None:
        self._options = options
        self._limits = limits
        allow_pixels(limits)
        self._decoders = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="wicore-decode")

    def __call__(self, encoded: Sequence[bytes]) -> UInt8:
        """Encoded pictures → [pictures and crops, 3, H, W] uint8 RGB, in order; thread-safe.

        Raises:
            InvalidImageError, ImageTooLargeError: see `pixels_of`.
            ImagesNotSupportedError: a picture for a text-only model.
        """
        options = self._options
        if not encoded:
            size = (options.height, options.width) if options else (0, 0)
            return np.empty((0, 3, *size), dtype=np.uint8)
        if options is None:
            raise ImagesNotSupportedError("this model reads text only; leave the images out")
        return np.concatenate(list(self._decoders.map(lambda data: pixels_of(data, options, self._limits), encoded)))

    def close(self) -> None:
        """End the threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)


def open_processor(repository: Path) -> ImageProcessor:
    """The image processor of a built repository, with the limits of its configuration.

    Raises:
        ArtifactError, ConfigError: see `manifest.load`, `config.load`, `read_options`.
    """
    settings = config.load(repository)
    built = manifest.load(repository, [contract.IMAGE_PROCESSOR])
    options = None
    if built.model.image:
        options = read_options(built.folder(contract.IMAGE_PROCESSOR), pan_and_scan=settings.pan_and_scan)
    return ImageProcessor(options, ImageLimits(settings.max_image_bytes, settings.max_image_pixels))
