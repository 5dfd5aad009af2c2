"""Random prompts for a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from builders.checkpoint import open_checkpoint

_FIRST_TEXT = 16
"""Below lie special tokens, in every checkpoint used here."""


@dataclass
class Prompt:
    """Token ids and the pictures their placeholders stand for."""

    ids: list[int]
    pixels: NDArray[np.uint8] | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)
    """(first placeholder, behind the last) of each picture."""


def text_ids(folder: Path, rng: np.random.Generator, count: int) -> list[int]:
    """Random ids of ordinary text."""
    config = open_checkpoint(folder).config
    special = [config.image_token_id, config.boi_token_id, config.eoi_token_id]
    ordinary = np.setdiff1d(np.arange(_FIRST_TEXT, config.text.vocab_size), [item for item in special if item])
    return rng.choice(ordinary, count).tolist()


def prompt(folder: Path, rng: np.random.Generator, *, text: int, pictures: int = 0) -> Prompt:
    """About ``text`` random tokens with ``pictures`` random pictures among them."""
    config = open_checkpoint(folder).config
    share = -(-text // (pictures + 1))
    ids, spans = [config.text.bos_token_id], []
    for _ in range(pictures):
        ids += [*text_ids(folder, rng, share), config.boi_token_id]
        spans.append((len(ids), len(ids) + config.vision.tokens_per_image))
        ids += [config.image_token_id] * config.vision.tokens_per_image + [config.eoi_token_id]
    ids += text_ids(folder, rng, share)
    if not pictures:
        return Prompt(ids)
    side = config.vision.image_size
    return Prompt(ids, rng.integers(0, 256, (pictures, 3, side, side), np.uint8), spans)


def twenty(folder: Path) -> list[Prompt]:
    """Twenty prompts of unequal lengths, shorter than the window to many times as long, with up to three pictures."""
    rng = np.random.default_rng(20)
    lengths = [1, 3, 9, 17, 30, 44, 61, 85, 120, 200]
    has_images = open_checkpoint(folder).config.vision is not None
    texts = [prompt(folder, rng, text=length) for length in lengths]
    others = [prompt(folder, rng, text=7 + 9 * index, pictures=(1, 3)[index % 2] * has_images) for index in range(10)]
    return [item for pair in zip(texts, others, strict=True) for item in pair]
