"""The decoder as one graph with stock attention gives transformers' logits, in chunks, batches and with images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from builders.checkpoint import ModelConfig, open_checkpoint
from builders.graph.attention import CacheNames
from builders.graph.pieces import write_pieces
from builders.graph.single import write_single
from python_backends.runtime.gpu.weights import GpuWeights, open_weights
from tests.builders.graph.cut_decoder import logits
from tests.builders.graph.standard_dialect import gpu_weights, relative_error, run, session
from tests.checkpoints import FIRST_TEXT, IMAGE, tiny
from tests.reference import reference

CAPACITY = 96
Array = NDArray[Any]


class Decoder:
    """Slots of caches that are handed from step to step."""

    def __init__(self, path: Path, config: ModelConfig, weights: GpuWeights, slots: int, activation: Any) -> None:
        self._session = session(path, weights, str)
        self._text, self._images = config.text, config.vision is not None
        shape = (slots, config.text.num_kv_heads, CAPACITY, config.text.head_dim)
        names = [CacheNames.of(layer) for layer in range(config.text.num_layers)]
        self._caches = {name: np.full(shape, np.nan, activation) for n in names for name in (n.past_key, n.past_value)}
        for cache in self._caches.values():
            cache[...] = 7  # what lies behind a sequence must not be seen

    def step(self, chunks: list[Array], past: list[int], features: Array | None = None) -> Array:
        """Right-padded chunks → logits [B, S, V]."""
        length = max(len(chunk) for chunk in chunks)
        ids = np.zeros((len(chunks), length), np.int32)
        for row, chunk in zip(ids, chunks, strict=True):
            row[: len(chunk)] = chunk
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "past_len": past,
            "query_len": [len(chunk) for chunk in chunks],
            "logit_positions": np.tile(np.arange(length), (len(chunks), 1)),
        }
        if self._images:
            at = ids == IMAGE
            index = np.where(at, np.cumsum(at).reshape(ids.shape) - 1, -1)
            starts = at & ~np.pad(at, ((0, 0), (1, 0)))[:, :-1]
            inputs |= {"image_index": index, "image_group": np.where(at, np.cumsum(starts, 1) - 1, -1)}
            inputs["image_features"] = np.zeros((1, self._text.hidden_size)) if features is None else features
        inputs = {name: value for name, value in inputs.items() if name in self.names}
        found = run(self._session, **inputs, **self._caches)
        self._caches = {name.replace("present", "past"): values for name, values in found.items() if "present" in name}
        logits: Array = found["logits"]
        return logits

    @property
    def names(self) -> set[str]:
        return {value.name for value in self._session.get_inputs()}


def decoder(family: str, folder: Path, precision: Any, slots: int, activation: Any = "fp32") -> Decoder:
    config = open_checkpoint(tiny(family)).config
    weights = gpu_weights(tiny(family), folder, precision)
    path = write_single(
        config.text, precision, folder, capacity=CAPACITY, images=config.vision is not None, activation=activation
    )
    return Decoder(path, config, weights, slots, {"fp32": np.float32, "fp16": np.float16}[activation])


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 6e-3)])
@pytest.mark.parametrize("family", ["1b", "27b"])
def test_chunks_and_decoded_tokens_of_two_sequences(
    tmp_path: Path, family: str, precision: Any, tolerance: float
) -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(FIRST_TEXT, IMAGE, count) for count in (40, 23)]
    run_of = decoder(family, tmp_path, precision, 2, precision)
    found: list[list[Array]] = [[], []]
    for start, stop in ((0, 17), (17, 19), (19, 22), *((at, at + 1) for at in range(22, 40))):
        chunks = [row[start:stop] for row in ids]
        logits = run_of.step(chunks, [min(start, len(row)) for row in ids])
        for row, chunk, values in zip(found, chunks, logits, strict=True):
            row.append(values[: len(chunk)])
    for row, parts in zip(ids, found, strict=True):
        wanted = reference(tiny(family)).logits(row)
        assert relative_error(np.concatenate(parts), wanted) < tolerance


@pytest.mark.parametrize("family", ["4b", "12b"])
def test_images_are_seen_both_ways(tmp_path: Path, family: str) -> None:
    config = open_checkpoint(tiny(family)).config
    assert config.vision is not None
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 3, config.vision.image_size, config.vision.image_size), np.uint8)
    features = reference(tiny(family)).image_features(pixels).reshape(-1, config.text.hidden_size)
    image = [IMAGE] * config.vision.tokens_per_image
    text = rng.integers(FIRST_TEXT, IMAGE, 12)
    ids = np.array([*text[:5], *image, *text[5:9], *image, *text[9:]])
    wanted = reference(tiny(family)).logits(ids, pixels)
    run_of = decoder(family, tmp_path, "fp32", 1)
    cut = 5 + len(image) + 2  # inside the text between the images
    first, second = np.split(features, 2)
    found = [run_of.step([ids[:cut]], [0], first), run_of.step([ids[cut:]], [cut], second)]
    assert relative_error(np.concatenate([part[0] for part in found]), wanted) < 1e-5


@pytest.mark.parametrize(("precision", "tolerance"), [("fp8", 0.15), ("int8", 0.02), ("int4", 0.02)])
def test_fewer_bits_give_the_logits_of_the_cut_decoder(tmp_path: Path, precision: Any, tolerance: float) -> None:
    text = open_checkpoint(tiny("1b")).config.text
    ids = np.random.default_rng(0).integers(FIRST_TEXT, IMAGE, 40)
    found = decoder("1b", tmp_path, precision, 1).step([ids], [0])[0]
    cut = logits(text, open_weights(tmp_path), write_pieces(text, precision, tmp_path, activation="fp32"), ids)
    assert relative_error(found, cut) < tolerance  # a last bit can move a rounding, by 3 % in fp8
