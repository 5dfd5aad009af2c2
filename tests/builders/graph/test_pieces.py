"""The decoder cut at attention, with attention written out in NumPy between the pieces, is transformers' decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from builders.checkpoint import open_checkpoint
from builders.graph.pieces import write_pieces
from builders.model_config import TextConfig
from python_backends.runtime.gpu.plans import BETWEEN, FIRST, LAST
from python_backends.runtime.gpu.weights import GpuWeights, Names
from tests.builders.graph.standard_dialect import (
    dequantized,
    element_type,
    gpu_weights,
    relative_error,
    run,
    session,
)
from tests.checkpoints import FIRST_TEXT, IMAGE, tiny
from tests.reference import reference

Array = NDArray[Any]


def rms_norm(x: Array, gamma: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gamma


def attention(text: TextConfig, weights: GpuWeights, layer: int, packed: Array) -> Array:
    """Packed q, k, v [M, …] → [M, H·hd] of one sequence from its start, causal, local layers within their window."""
    tokens, kind = len(packed), text.layer_types[layer]
    heads = packed.astype(np.float64).reshape(tokens, -1, text.head_dim)
    query, key, value = np.split(heads, [text.num_heads, text.num_heads + text.num_kv_heads], axis=1)
    angles = np.arange(tokens)[:, None] * weights.read(Names.inverse_frequency(kind))
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def rotated(x: Array, gamma: str) -> Array:
        first, second = np.split(rms_norm(x, weights.read(Names.layer(layer, gamma))), 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    group = text.num_heads // text.num_kv_heads
    query, key = rotated(query, Names.Q_NORM), np.repeat(rotated(key, Names.K_NORM), group, 1)
    scores = np.einsum("qhd,khd->hqk", query, key)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    seen = (distance >= 0) & ((distance < text.sliding_window) | (kind == "global"))
    scores = np.where(seen, scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", shares, np.repeat(value, group, 1)).reshape(tokens, -1)


def following(layer: int) -> Callable[[str], str]:
    """Names in a piece behind a layer's attention → names in the weight file: ``BETWEEN`` ends in the next layer."""
    return lambda name: Names.layer(layer + (name.removesuffix(".scale") in {Names.INPUT_NORM, Names.QKV}), name)


def logits(text: TextConfig, weights: GpuWeights, pieces: dict[str, Path], ids: Array) -> Array:
    embed = dequantized(weights, Names.EMBED, text.hidden_size)
    stream = embed[ids] * np.float32(weights.embed_scale)
    first = session(pieces[FIRST], weights, lambda name: Names.layer(0, name))
    packed = run(first, stream=stream)["packed"]
    for layer in range(text.num_layers):
        attended = attention(text, weights, layer, packed)
        piece = BETWEEN if layer + 1 < text.num_layers else LAST
        found = run(session(pieces[piece], weights, following(layer)), attended=attended, stream=stream)
        stream, packed = found["next_stream"], found.get("packed")
    assert packed is None
    return rms_norm(stream, weights.read(Names.NORM)) @ embed.T


@pytest.mark.parametrize("family", ["1b", "27b"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 6e-3)])
def test_pieces_and_attention_give_transformers_logits(
    tmp_path: Path, family: str, precision: Any, tolerance: float
) -> None:
    text = open_checkpoint(tiny(family)).config.text
    weights = gpu_weights(tiny(family), tmp_path, precision)
    ids = np.random.default_rng(0).integers(FIRST_TEXT, IMAGE, 40)
    found = logits(text, weights, write_pieces(text, precision, tmp_path), ids)
    assert relative_error(found, reference(tiny(family)).logits(ids)) < tolerance


@pytest.mark.parametrize("family", ["1b", "27b"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp8", 0.06), ("int8", 0.02), ("int4", 0.02)])
def test_fewer_bits_cost_no_more_than_rounding_activations(
    tmp_path: Path, family: str, precision: Any, tolerance: float
) -> None:
    text = open_checkpoint(tiny(family)).config.text
    weights = gpu_weights(tiny(family), tmp_path, precision)
    (tmp_path / "wide").mkdir()
    narrow = write_pieces(text, precision, tmp_path, activation="fp32")[BETWEEN]
    wide = write_pieces(text, "fp32", tmp_path / "wide")[BETWEEN]
    rng = np.random.default_rng(0)
    stream = rng.standard_normal((9, text.hidden_size))
    attended = rng.standard_normal((9, text.num_heads * text.head_dim)) * 10 ** rng.uniform(-3, 3, (9, 1))
    found = run(session(narrow, weights, following(2)), stream=stream, attended=attended)
    wanted = run(session(wide, weights, following(2), wide=True), stream=stream, attended=attended)
    for name, values in wanted.items():
        assert 0 < relative_error(found[name], values) < tolerance, (name, relative_error(found[name], values))


@pytest.mark.parametrize(
    ("precision", "activation", "matrices"),
    [
        ("bf16", "BFLOAT16", ["BFLOAT16"] * 4),
        ("fp16", "FLOAT16", ["FLOAT16"] * 4),
        ("fp8", "BFLOAT16", ["FLOAT8E4M3FN"] * 4),
        ("int8", "BFLOAT16", ["INT8"] * 4),
        ("int4", "BFLOAT16", ["INT8", "INT8", "INT4", "INT4"]),
    ],
)
def test_a_piece_takes_weights_as_the_weight_file_stores_them(
    tmp_path: Path, precision: Any, activation: str, matrices: list[str]
) -> None:
    piece = write_pieces(open_checkpoint(tiny("1b")).config.text, precision, tmp_path)[BETWEEN]
    assert [element_type(piece, name) for name in Names.MATRICES] == matrices
    assert {element_type(piece, name) for name in ("attended", "packed")} == {activation}
    assert {element_type(piece, name) for name in ("stream", "next_stream", Names.INPUT_NORM)} == {"FLOAT"}
