"""The decoder's step graph: embeddings, layers, head and sampling for right-padded chunks over KV slots.

Inputs and outputs are those of `python_backends.runtime.base.StepInputs` and `StepOutputs`, plus ``past_key.i``,
``past_value.i`` and ``present_key.i``, ``present_value.i`` for every layer. The residual stream, the norms and RoPE
are float32 in every precision, because Gemma-3's residuals overflow float16.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnx import TensorProto

from builders.checkpoint import Checkpoint, TextConfig, concat_rows, map_rows
from builders.graph.attention import CacheNames, ContribAttention
from builders.graph.linear import Linears, Matrix
from builders.graph.sampling import sample
from builders.graph.writer import Dim, GraphWriter, Value
from builders.quantize import FLOATS, Precision
from builders.weights import WeightFile

MODEL_FILE = "decoder.onnx"
WEIGHT_FILE = "decoder.weights"

DEFAULT_ACCURACY_LEVEL = 4


def write_decoder(
    checkpoint: Checkpoint,
    precision: Precision,
    folder: Path,
    progress: Callable[[int], None] | None = None,
    *,
    accuracy_level: int = DEFAULT_ACCURACY_LEVEL,
) -> None:
    """Write ``decoder.onnx`` and ``decoder.weights`` into ``folder``.

    ``progress`` is told the bytes of every piece of weights written. ``accuracy_level`` is MatMulNBits's and matters
    for int8 and int4 only.

    Raises:
        BuildError: the checkpoint cannot be read or converted.
        OSError: the disk is full.
    """
    with WeightFile(folder / WEIGHT_FILE, progress) as weights:
        graph = GraphWriter(weights)
        _Decoder(graph, checkpoint, precision, accuracy_level).write()
        graph.save(folder / MODEL_FILE)


def attention_precision(precision: Precision) -> Precision:
    """How the attention projections are stored: as the rest, but in eight bits where the rest has four.

    They are a tenth of a layer's weights and make almost half of its error, because the norm behind attention gives
    both branches of a layer the same weight (figures in docs/performance.md).
    """
    return dataclasses.replace(precision, name="int8") if precision.name == "int4" else precision


class _Decoder:
    def __init__(self, graph: GraphWriter, checkpoint: Checkpoint, precision: Precision, accuracy_level: int) -> None:
        self._graph = graph
        self._checkpoint = checkpoint
        self._text = checkpoint.config.text
        self._images = checkpoint.config.vision is not None
        self._linears = Linears(graph, precision, accuracy_level)
        self._projections = Linears(graph, attention_precision(precision), accuracy_level)
        # Half the memory at the same speed; the rounding is far below that of the weights.
        self._cache_dtype = FLOATS.get(precision.name, TensorProto.FLOAT16)
        shape = graph.op("Shape", "input_ids")
        self._by_row = graph.op("Concat", shape, graph.ints(-1), axis=0)
        self._by_head = graph.op("Concat", shape, graph.ints(-1, self._text.head_dim), axis=0)

    def write(self) -> None:
        graph, text = self._graph, self._text
        self._declare_inputs()
        attention = ContribAttention(graph, text, images=self._images, cache_dtype=self._cache_dtype)
        rotations = {kind: _rotation(graph, text, kind) for kind in sorted(set(text.layer_types))}
        embedding = self._linears.store(self._checkpoint.tensor("embed_tokens.weight"), "embed_tokens.weight")
        stream = self._embed(embedding)
        for layer, kind in enumerate(text.layer_types):
            stream = self._attend(stream, layer, attention, rotations[kind])
            stream = self._feed_forward(stream, layer)
        self._head(stream, embedding)

    def _declare_inputs(self) -> None:
        graph, text = self._graph, self._text
        for name, dtype, shape in step_inputs(text, images=self._images):
            graph.input(name, dtype, shape)
        for layer, kind in enumerate(text.layer_types):
            cache = CacheNames.of(layer)
            dims: list[Dim] = ["B", text.num_kv_heads, f"{kind}_capacity", text.head_dim]
            for name in (cache.past_key, cache.past_value):
                graph.input(name, self._cache_dtype, dims)
            for name in (cache.present_key, cache.present_value):
                graph.output(name, self._cache_dtype, dims)

    def _embed(self, embedding: Matrix) -> Value:
        """The residual stream [B·S, D] before the first layer."""
        graph, flat = self._graph, self._graph.ints(-1)
        ids = graph.reshape("input_ids", flat)
        normalizer = graph.constant(math.sqrt(self._text.hidden_size), np.float32)
        if not self._images:
            return graph.op("Mul", self._linears.lookup(ids, embedding), normalizer)
        index = graph.reshape("image_index", flat)
        zero = graph.constant(0, np.int32)
        is_image = graph.op("GreaterOrEqual", index, zero)
        text = graph.op("Mul", self._linears.lookup(graph.op("Where", is_image, zero, ids), embedding), normalizer)
        features = graph.op("Gather", "image_features", graph.op("Max", index, zero), axis=0)
        return graph.op("Where", graph.op("Unsqueeze", is_image, graph.ints(1)), features, text)

    def _attend(self, stream: Value, layer: int, attention: ContribAttention, rotation: tuple[Value, Value]) -> Value:
        graph, text, prefix = self._graph, self._text, f"layers.{layer}."
        x = self._norm(stream, prefix + "input_layernorm")
        projected = self._linear(self._projections, x, prefix + "self_attn", "q_proj", "k_proj", "v_proj")
        packed = graph.reshape(projected, self._by_row)
        widths = (text.num_heads * text.head_dim, *[text.num_kv_heads * text.head_dim] * 2)
        query, key, value = graph.ops("Split", packed, graph.ints(*widths), outputs=3, axis=2)
        # The score's scale rides on the query norm's weight.
        query = self._headwise_norm(query, prefix + "self_attn.q_norm", text.query_pre_attn_scalar**-0.5)
        key = self._headwise_norm(key, prefix + "self_attn.k_norm")
        query = graph.op("RotaryEmbedding", query, *rotation, num_heads=text.num_heads)
        key = graph.op("RotaryEmbedding", key, *rotation, num_heads=text.num_kv_heads)
        x = graph.reshape(attention.apply(query, key, value, layer), graph.ints(-1, widths[0]))
        x = self._linear(self._projections, x, prefix + "self_attn", "o_proj")
        return graph.op("Add", stream, self._norm(x, prefix + "post_attention_layernorm"))

    def _feed_forward(self, stream: Value, layer: int) -> Value:
        graph, prefix = self._graph, f"layers.{layer}."
        x = self._norm(stream, prefix + "pre_feedforward_layernorm")
        packed = self._linear(self._linears, x, prefix + "mlp", "gate_proj", "up_proj")
        gate, up = graph.ops("Split", packed, outputs=2, axis=1, num_outputs=2)
        gated = graph.op("Mul", graph.op("Gelu", gate, approximate="tanh"), up)
        x = self._linear(self._linears, gated, prefix + "mlp", "down_proj")
        return graph.op("Add", stream, self._norm(x, prefix + "post_feedforward_layernorm"))

    def _headwise_norm(self, x: Value, name: str, scale: float = 1.0) -> Value:
        """[B, S, heads·head_dim] with every head normed on its own."""
        return self._graph.reshape(self._norm(self._graph.reshape(x, self._by_head), name, scale), self._by_row)

    def _linear(self, linears: Linears, x: Value, prefix: str, *names: str) -> Value:
        """One product for projections that share their input."""
        tensors = [self._checkpoint.tensor(f"{prefix}.{name}.weight") for name in names]
        weight = concat_rows(tensors) if len(tensors) > 1 else tensors[0]
        return linears.apply(x, linears.store(weight, f"{prefix}.{'_'.join(names)}.weight"))

    def _norm(self, x: Value, name: str, scale: float = 1.0) -> Value:
        """RMS norm over the last axis with Gemma's weight 1 + w, times ``scale``."""
        weight = map_rows(self._checkpoint.tensor(f"{name}.weight"), lambda w: (1 + w) * np.float32(scale))
        gamma = self._graph.weight(f"{name}.weight", weight)
        return self._graph.op("RMSNormalization", x, gamma, axis=-1, epsilon=self._text.rms_norm_eps)

    def _head(self, stream: Value, embedding: Matrix) -> None:
        """Logits of the rows asked for, and the tokens drawn from them."""
        graph, text = self._graph, self._text
        rows = graph.op("Unsqueeze", graph.cast("logit_positions", TensorProto.INT64), graph.ints(2))
        wanted = graph.op("GatherND", graph.reshape(stream, self._by_row), rows, batch_dims=1)
        x = self._norm(wanted, "norm")
        head = embedding
        if not text.tie_embeddings:
            head = self._linears.store(self._checkpoint.tensor("lm_head.weight"), "lm_head.weight")
        sample(graph, self._linears.logits(x, head, "logits"), text.vocab_size)
        graph.output("logits", TensorProto.FLOAT, ["B", "R", text.vocab_size])


def step_inputs(text: TextConfig, *, images: bool) -> list[tuple[str, int, list[Dim]]]:
    """Name, element type and shape of every graph input but the caches and those of sampling."""
    integer, real = TensorProto.INT32, TensorProto.FLOAT
    inputs: list[tuple[str, int, list[Dim]]] = [
        ("input_ids", integer, ["B", "S"]),
        ("past_len", integer, ["B"]),
        ("query_len", integer, ["B"]),
        ("logit_positions", integer, ["B", "R"]),
    ]
    if images:
        inputs += [
            ("image_features", real, ["M", text.hidden_size]),
            ("image_index", integer, ["B", "S"]),
            ("image_group", integer, ["B", "S"]),
        ]
    return inputs


def _rotation(graph: GraphWriter, text: TextConfig, kind: str) -> tuple[Value, Value]:
    """cos and sin [B, S, head_dim/2] of the chunk's positions.

    Computed every step: tables for 131,072 positions would hold 128 MB per base.
    """
    theta = text.rope_theta_local if kind == "local" else text.rope_theta_global
    factor = 1.0 if kind == "local" else text.rope_scaling_factor
    frequencies = theta ** -(np.arange(0, text.head_dim, 2) / text.head_dim) / factor
    chunk = graph.op("Squeeze", graph.op("Shape", "input_ids", start=1, end=2))
    offsets = graph.op("Range", graph.constant(0, np.int64), chunk, graph.constant(1, np.int64))
    past = graph.op("Unsqueeze", graph.cast("past_len", TensorProto.INT64), graph.ints(1))
    positions = graph.cast(graph.op("Add", past, offsets), TensorProto.FLOAT)
    angles = graph.op("Mul", graph.op("Unsqueeze", positions, graph.ints(2)), graph.constant(frequencies, np.float32))
    return graph.op("Cos", angles), graph.op("Sin", angles)
