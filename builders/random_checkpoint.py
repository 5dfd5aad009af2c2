"""Checkpoints of every Gemma-3 shape with random bfloat16 weights, for benchmarks and for tests of size.

What they answer means nothing; what they cost is what the published ones cost. They come with a tokenizer of the right
size, so that the whole path from a text to a text works.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from builders.checkpoint import expected_shapes
from builders.model_config import read_model_config
from builders.published_configs import PUBLISHED, SMALL_MULTIMODAL, TINY
from python_backends.errors import BuildError

Shape = tuple[int, ...]

SHAPES: dict[str, dict[str, Any]] = {"tiny": TINY, **PUBLISHED, "1b-vision": SMALL_MULTIMODAL}
SHARD_BYTES = 5 * 10**9
BLOCK = 2**21 - 9
"""Numbers that tensors are cut from. A prime, so that no two rows of a matrix begin at the same one."""
STANDARD_DEVIATION = 0.02
WORDS_FROM = 512
"""First token id that is a made-up word; before it are control tokens, characters and bytes, as in Gemma."""
FEWEST_TOKENS = 1024
_NAMED = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 105: "<start_of_turn>", 106: "<end_of_turn>"}
_NEWLINES, _BYTES, _CHARACTERS = 107, 138, 394
_PRINTABLE = "▁" + "".join(map(chr, range(33, 127)))
_SYLLABLES = [first + vowel for first in "bdfghjklmnprstvwz" for vowel in "aeiou"]


def make_checkpoint(folder: Path, shape: str, layers: int | None = None) -> int:
    """Write a complete checkpoint folder: config, weights, tokenizer, chat template, processor settings.

    Args:
        folder: made; must not exist.
        shape: a key of `SHAPES`.
        layers: keep this many layers of the language model; None keeps all.

    Returns:
        Bytes of the weights.

    Raises:
        BuildError: an unknown shape, layers it does not have, or a folder that exists.
    """
    config = shape_config(shape, layers)
    if folder.exists():
        raise BuildError(f"{folder} exists already; name a new folder, or remove it first")
    size = write_random_checkpoint(folder, config)
    write_random_tokenizer(folder)
    return size


def shape_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a shape, cut to its first ``layers``.

    Raises:
        BuildError: an unknown shape, or a number of layers it does not have.
    """
    if shape not in SHAPES:
        raise BuildError(f"there is no shape {shape!r}; choose one of {', '.join(SHAPES)}")
    config = SHAPES[shape]
    if layers is None:
        return config
    text = dict(config.get("text_config", config))
    if not 1 <= layers <= text["num_hidden_layers"]:
        raise BuildError(f"{shape} has {text['num_hidden_layers']} layers; --layers must be 1 to that")
    text["num_hidden_layers"] = layers
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:layers]
    return {**config, "text_config": text} if "text_config" in config else text


def write_random_checkpoint(folder: Path, config: dict[str, Any], shard_bytes: int = SHARD_BYTES) -> int:
    """Write config.json and sharded weights; returns the bytes of the weights. Holds a few MB at a time.

    Every tensor is cut from one block of normal numbers at an offset of its own.
    """
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", config)
    model = read_model_config(folder)
    multimodal = model.vision is not None
    shapes = {published_name(name, multimodal=multimodal): shape for name, shape in expected_shapes(model).items()}
    shards = list(_shards(shapes, shard_bytes))
    block = (np.random.default_rng(0).standard_normal(BLOCK) * STANDARD_DEVIATION).astype(ml_dtypes.bfloat16)
    where = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        where.update(dict.fromkeys(shard, file))
        _write_shard(folder / file, shard, np.concatenate([block, block]).tobytes())
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return total


def published_name(name: str, *, multimodal: bool) -> str:
    """The name of a canonical tensor in published checkpoints; others would load only part of them, and say little."""
    for canonical, published in (("vision.", "vision_tower.vision_model."), ("projector.", "multi_modal_projector.")):
        if name.startswith(canonical):
            return published + name.removeprefix(canonical)
    inner = name if name.startswith("lm_head.") else f"model.{name}"
    return f"language_model.{inner}" if multimodal else inner


def write_random_tokenizer(folder: Path) -> None:
    """Write tokenizer, chat template and processor settings beside a checkpoint's config.json.

    Gemma's layout: the same control tokens at the same ids, line feeds, all bytes, printable ASCII; then made-up words
    up to the vocabulary's size, each with the space before it. A text of those words has one token per word; any other
    falls back to characters and bytes.

    Raises:
        BuildError: a vocabulary that has no room for the bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    from builders.demo.tokenizer import CHAT_TEMPLATE

    config = read_model_config(folder)
    size = config.text.vocab_size
    if size < FEWEST_TOKENS:
        raise BuildError(f"a tokenizer for {size} tokens; it needs {FEWEST_TOKENS} for its bytes and control tokens")
    control = dict(_NAMED)
    pictures = (config.boi_token_id, config.eoi_token_id, config.image_token_id)
    for number, token in zip(pictures, ("<start_of_image>", "<end_of_image>", "<image_soft_token>"), strict=True):
        if number is not None:
            control[number] = token
    if config.image_token_id is not None:
        size = config.image_token_id + 1
    pieces = {piece: number for number, piece in enumerate(_pieces(size, control))}
    tokenizer = Tokenizer(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|▁?[^▁\n]+|▁"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(control.values()))
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    names |= {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    _write_json(folder / "tokenizer_config.json", {**names, "tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    if config.vision is not None:
        side = {"height": config.vision.image_size, "width": config.vision.image_size}
        _write_json(
            folder / "preprocessor_config.json", {"size": side, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        )
        _write_json(folder / "processor_config.json", {"image_seq_length": config.vision.tokens_per_image})


def _pieces(size: int, control: dict[int, str]) -> Iterator[str]:
    """The vocabulary in order of id."""
    words = _words()
    for number in range(size):
        if number in control:
            yield control[number]
        elif _NEWLINES <= number < _BYTES:
            yield "\n" * (number - _NEWLINES + 1)
        elif _BYTES <= number < _CHARACTERS:
            yield f"<0x{number - _BYTES:02X}>"
        elif _CHARACTERS <= number < _CHARACTERS + len(_PRINTABLE):
            yield _PRINTABLE[number - _CHARACTERS]
        elif number >= WORDS_FROM:
            yield next(words)
        else:
            yield f"<unused{number}>"


def _words() -> Iterator[str]:
    for syllables in itertools.count(2):
        for parts in itertools.product(_SYLLABLES, repeat=syllables):
            yield "▁" + "".join(parts)


def _shards(shapes: dict[str, Shape], shard_bytes: int) -> Iterator[dict[str, Shape]]:
    shard: dict[str, Shape] = {}
    size = 0
    for name, shape in shapes.items():
        length = 2 * math.prod(shape)
        if shard and size + length > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name], size = shape, size + length
    yield shard


def _write_shard(path: Path, shapes: dict[str, Shape], block: bytes) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        length = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + length]}
        offset += length
    raw = json.dumps(header).encode()
    half = len(block) // 2
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for index, shape in enumerate(shapes.values()):
            left = 2 * math.prod(shape)
            start = 2 * (index * 7919 % BLOCK)
            while left:
                piece = block[start : start + min(half, left)]
                file.write(piece)
                left -= len(piece)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")
