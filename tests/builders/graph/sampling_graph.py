"""The sampling graph by itself, on a small vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto

from builders.graph.sampling import sample
from builders.graph.writer import GraphWriter
from builders.weights import WeightFile

V = 97
"""No multiple of 32: the mask's last word is not full."""
DTYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}


def sampler(folder: Path, vocab_size: int = V) -> Callable[..., dict[str, np.ndarray]]:
    """The sampling graph alone: logits [B, R, V] and any other inputs by name → outputs by name."""
    with WeightFile(folder / "sampling.weights") as weights:
        graph = GraphWriter(weights)
        graph.input("logits", TensorProto.FLOAT, ["B", "R", vocab_size])
        sample(graph, "logits", vocab_size)
        graph.save(folder / "sampling.onnx")
    session = onnxruntime.InferenceSession(folder / "sampling.onnx", providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]

    def run(logits, **inputs):
        rows, positions, _ = np.shape(logits)
        neutral = {
            "temperature": np.zeros(rows),
            "top_k": np.zeros(rows),
            "top_p": np.ones(rows),
            "min_p": np.zeros(rows),
            "uniform": np.full((rows, positions), 0.5),
            "targets": np.full((rows, positions), -1),
            "adjust_ids": np.zeros((rows, 0)),
            "adjust_factor": np.ones(np.shape(inputs.get("adjust_ids", np.zeros((rows, 0))))),
            "adjust_bias": np.zeros(np.shape(inputs.get("adjust_ids", np.zeros((rows, 0))))),
            "token_mask": np.zeros((rows, positions, 0)),
            "top_n": [0],
        }
        assert set(inputs) <= set(neutral)
        values = {"logits": logits, **neutral, **inputs}
        feeds = {item.name: np.asarray(values[item.name], DTYPES[item.type]) for item in session.get_inputs()}
        return dict(zip(names, session.run(None, feeds), strict=True))

    return run


def logits_of(seed):
    return np.random.default_rng(seed).normal(0, 3, V).astype(np.float32)


def listed(ids, factor=1.0, bias=0.0, padding=0):
    """Adjustments of one row."""
    count = len(ids)
    columns = {"adjust_ids": (ids, -1), "adjust_factor": (factor, 9.0), "adjust_bias": (bias, 9.0)}
    return {
        name: np.concatenate([np.broadcast_to(value, count), np.full(padding, fill)])[None]
        for name, (value, fill) in columns.items()
    }


def words_of(allowed):
    """bool [..., V] → int32 [..., ceil(V / 32)]."""
    padded = np.zeros((*allowed.shape[:-1], -(-allowed.shape[-1] // 32) * 32), bool)
    padded[..., : allowed.shape[-1]] = allowed
    return np.packbits(padded, axis=-1, bitorder="little").view(np.int32)
