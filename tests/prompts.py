"""Random prompts for the checkpoints of `tests.checkpoints`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import BOI, BOS, EOI, FAMILIES, FIRST_TEXT, IMAGE


@dataclass
class Prompt:
    """Token ids and the pictures their placeholders stand for."""

    ids: list[int]
    pixels: NDArray[np.uint8] | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)
    """(first placeholder, behind the last) of each picture."""


def prompt(family: str, rng: np.random.Generator, *, text: int, pictures: int = 0) -> Prompt:
    """``text`` random tokens with ``pictures`` random pictures among them."""
    tokens, sizes = FAMILIES[family].tokens_per_image, FAMILIES[family].vision
    ids, spans = [BOS], []
    for piece in np.array_split(rng.integers(FIRST_TEXT, IMAGE, text), pictures + 1)[:-1]:
        ids += [*piece.tolist(), BOI]
        spans.append((len(ids), len(ids) + tokens))
        ids += [IMAGE] * tokens + [EOI]
    ids += rng.integers(FIRST_TEXT, IMAGE, -(-text // (pictures + 1))).tolist()
    if not pictures:
        return Prompt(ids)
    side = sizes["image_size"]
    return Prompt(ids, rng.integers(0, 256, (pictures, 3, side, side), np.uint8), spans)


def twenty(family: str) -> list[Prompt]:
    """Twenty prompts of unequal lengths, shorter than the window to many times as long, with up to three pictures."""
    rng = np.random.default_rng(20)
    lengths = [1, 3, 9, 17, 30, 44, 61, 85, 120, 200]
    has_images = FAMILIES[family].vision is not None
    texts = [prompt(family, rng, text=length) for length in lengths]
    others = [prompt(family, rng, text=7 + 9 * index, pictures=(1, 3)[index % 2] * has_images) for index in range(10)]
    return [item for pair in zip(texts, others, strict=True) for item in pair]
