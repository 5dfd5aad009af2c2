"""The small files beside the weights: checked, and copied to the stages that read them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from builders.identity import SIDE_FILES
from builders.model_config import VisionConfig, read_json
from python_backends.errors import BuildError

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def write_tokenizer(source: Path, folder: Path) -> None:
    """Copy what the tokenizer stage reads: the fast tokenizer, the chat template and the processor's settings.

    Raises:
        BuildError: no tokenizer.json, or one that does not load.
    """
    from tokenizers import Tokenizer

    path = source / "tokenizer.json"
    if not path.is_file():
        raise BuildError(
            f"{source} has no tokenizer.json; download it, or write it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BuildError(f"{path} is not a tokenizer ({error}); download it again") from error
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_image_processor(source: Path, vision: VisionConfig, folder: Path) -> None:
    """Copy the settings the image processor stage reads, after checking them against the vision tower.

    Raises:
        BuildError: no settings, or settings for images of another size or token count.
    """
    sides: dict[str, Any] = {}
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            values = read_json(source / name)
            sides.update(values, **(values.get("image_processor") or {}))
    size = sides.get("size")
    if not isinstance(size, dict):
        raise BuildError(
            f"{source} has no image size in preprocessor_config.json or processor_config.json; download them"
        )
    if (size.get("height"), size.get("width")) != (vision.image_size, vision.image_size):
        raise BuildError(
            f"{source}: the processor makes images of size {size}, the vision tower takes {vision.image_size} pixels "
            "a side; the files are of different models"
        )
    if sides.get("image_seq_length", vision.tokens_per_image) != vision.tokens_per_image:
        raise BuildError(
            f"{source}: the processor reserves {sides['image_seq_length']} tokens for an image, the model "
            f"makes {vision.tokens_per_image}; the files are of different models"
        )
    _check_normalisation(source, sides)
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _check_normalisation(source: Path, sides: dict[str, Any]) -> None:
    """The vision graph maps 0 … 255 to −1 … 1, as every Gemma-3 does; other settings would be silently ignored."""
    for key, wanted in (("image_mean", 0.5), ("image_std", 0.5), ("rescale_factor", 1 / 255)):
        found = sides.get(key)
        values = found if isinstance(found, list) else [wanted if found is None else found]
        if any(abs(value - wanted) > 1e-9 for value in values):
            raise BuildError(
                f"{source}: the processor's {key} is {found}; only Gemma-3's own {wanted:.6g} is supported"
            )
