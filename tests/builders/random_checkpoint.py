"""Checkpoints of any size with random bfloat16 weights, written as a stream."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from builders.checkpoint import expected_shapes
from builders.model_config import read_model_config
from tests.builders.checkpoint_files import write_json

Shape = tuple[int, ...]


def published_name(name: str) -> str:
    """The name of a canonical tensor in published multimodal checkpoints."""
    for canonical, published in (("vision.", "vision_tower.vision_model."), ("projector.", "multi_modal_projector.")):
        if name.startswith(canonical):
            return published + name.removeprefix(canonical)
    return "language_model.model." + name


def write_random_checkpoint(folder: Path, config: dict[str, Any], shard_bytes: int = 5 * 10**9) -> int:
    """Write config.json and sharded weights; returns the bytes of the weights. Holds a few MB at a time.

    Every tensor is cut from one block of normal numbers at an offset of its own.
    """
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    shapes = {published_name(name): shape for name, shape in expected_shapes(read_model_config(folder)).items()}
    shards = list(_shards(shapes, shard_bytes))
    block = (np.random.default_rng(0).standard_normal(2**21) * 0.02).astype(ml_dtypes.bfloat16)
    where = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        where.update(dict.fromkeys(shard, file))
        _write_shard(folder / file, shard, np.concatenate([block, block]).tobytes())
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return total


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
            start = 2 * (index * 7919 % (half // 2))
            while left:
                piece = block[start : start + min(half, left)]
                file.write(piece)
                left -= len(piece)
