"""The decoder from its pieces, with attention written out in NumPy between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders.model_config import TextConfig
from python_backends.runtime.gpu.plans import BETWEEN, FIRST, LAST
from python_backends.runtime.gpu.weights import GpuWeights, Names
from tests.builders.graph.standard_dialect import dequantized, run, session

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
