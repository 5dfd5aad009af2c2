"""The whole decoder as one graph with stock attention: the simple variant, and the reference for the cut one.

Inputs are `builders.graph.decoder.step_inputs`, caches ``past_key.i``, ``past_value.i`` [B, KV, capacity, hd] whose
batch row is a slot, and weights named as in the weight file; outputs are float32 ``logits`` [B, R, V] and the caches
``present_key.i``, ``present_value.i``, which a runtime binds to the memory of the past ones. Tokens are drawn from the
logits by the kernels that the cut decoder uses.

Every query has its row of an explicit mask, which covers right padding, windows and images that are seen both ways.
What TensorRT would take instead does not do: it reads TensorScatter's circular mode not at all and Attention's
``nonpad_kv_seqlen`` without regarding it (TensorRT-RTX 1.6). So caches of local layers hold the whole context.
A chunk's padding is written behind its tokens: a cache needs room for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto

from builders.gpu_weights import inverse_frequency, storage
from builders.graph.attention import CacheNames
from builders.graph.decoder import step_inputs
from builders.graph.standard import LARGEST, ONNX_DTYPES, StandardLayers, matrix_shape
from builders.graph.writer import STANDARD_OPSET, GraphWriter, Value
from builders.model_config import TextConfig
from builders.quantize import PrecisionName
from python_backends.runtime.gpu.plans import SINGLE
from python_backends.runtime.gpu.weights import Names


def write_single(
    text: TextConfig,
    precision: PrecisionName,
    folder: Path,
    *,
    capacity: int,
    images: bool,
    activation: str | None = None,
) -> Path:
    """Write ``single.onnx`` into ``folder``; it holds no weights.

    Args:
        text: sizes.
        precision: of the weights.
        folder: target.
        capacity: tokens that a slot's caches hold.
        images: whether chunks may hold image embeddings.
        activation: replaces the precision's element type of activations and caches.
    """
    graph = GraphWriter(opset=STANDARD_OPSET)
    layers = StandardLayers(graph, text, precision, activation)
    _Single(graph, text, precision, layers, capacity, images=images).write()
    path = folder / f"{SINGLE}.onnx"
    graph.save(path)
    return path


class _Single:
    def __init__(
        self,
        graph: GraphWriter,
        text: TextConfig,
        precision: PrecisionName,
        layers: StandardLayers,
        capacity: int,
        *,
        images: bool,
    ) -> None:
        self._graph, self._text, self._precision, self._layers = graph, text, precision, layers
        self._capacity, self._images = capacity, images

    def write(self) -> None:
        graph, text = self._graph, self._text
        for name, dtype, shape in step_inputs(text, images=self._images):
            graph.input(name, dtype, shape)
        self._chunk = graph.op("Shape", "input_ids", start=1, end=2)
        self._past = graph.cast("past_len", TensorProto.INT64)
        positions = graph.op("Add", graph.op("Unsqueeze", self._past, graph.ints(1)), self._range(self._chunk))
        kinds = sorted(set(text.layer_types))
        masks = self._masks(positions, kinds)
        angles = graph.op("Unsqueeze", graph.cast(positions, TensorProto.FLOAT), graph.ints(2))
        rotations = {}
        for kind in kinds:
            turned = graph.op("Mul", angles, graph.constant(inverse_frequency(text, kind), np.float32))
            rotations[kind] = graph.op("Cos", turned), graph.op("Sin", turned)  # [B, S, hd / 2]
        stream = self._embed()
        for layer, kind in enumerate(text.layer_types):
            packed = self._layers.projections(stream, lambda name, layer=layer: Names.layer(layer, name))  # type: ignore[misc]
            attended = self._attention(packed, layer, rotations[kind], masks[kind])
            stream = self._layers.behind_attention(
                attended,
                stream,
                lambda name, layer=layer: Names.layer(layer, name),  # type: ignore[misc]
            )
        self._head(stream)

    def _range(self, count: Value) -> Value:
        """0 … count − 1; ``count`` is int64 [1]."""
        zero, one = (self._graph.constant(value, np.int64) for value in (0, 1))
        return self._graph.op("Range", zero, self._graph.op("Squeeze", count, self._graph.ints(0)), one)

    def _masks(self, positions: Value, kinds: Sequence[str]) -> dict[str, Value]:
        """By type of layer: bool [B, 1, S, capacity], True where a query sees a key."""
        graph = self._graph
        keys = graph.constant(np.arange(self._capacity), np.int64)
        query = graph.op("Unsqueeze", positions, graph.ints(2))  # [B, S, 1]
        seen = graph.op("LessOrEqual", keys, query)
        if self._images:
            seen = graph.op("Or", seen, self._same_image(keys))
        found = {}
        for kind in kinds:
            mask = seen
            if kind == "local":
                reach = graph.op("Sub", query, graph.constant(self._text.sliding_window, np.int64))
                mask = graph.op("And", seen, graph.op("Greater", keys, reach))
            found[kind] = graph.op("Unsqueeze", mask, graph.ints(1))
        return found

    def _same_image(self, keys: Value) -> Value:
        """bool [B, S, capacity]: key and query belong to one image, which lies wholly in the chunk."""
        graph = self._graph
        offsets = graph.op("Sub", keys, graph.op("Unsqueeze", self._past, graph.ints(1)))  # [B, capacity]
        zero, one = (graph.constant(value, np.int64) for value in (0, 1))
        inside = graph.op("And", graph.op("GreaterOrEqual", offsets, zero), graph.op("Less", offsets, self._chunk))
        within = graph.op("Max", graph.op("Min", offsets, graph.op("Sub", self._chunk, one)), zero)
        groups = graph.op("GatherElements", "image_group", within, axis=1)
        groups = graph.op("Where", inside, groups, graph.constant(-1, np.int32))
        query = graph.op("Unsqueeze", "image_group", graph.ints(2))
        same = graph.op("Equal", graph.op("Unsqueeze", groups, graph.ints(1)), query)
        return graph.op("And", same, graph.op("GreaterOrEqual", query, graph.constant(0, np.int32)))

    def _embed(self) -> Value:
        """The stream [B·S, D] before the first layer."""
        graph, text, flat = self._graph, self._text, self._graph.ints(-1)
        stored = storage(self._precision, Names.EMBED)
        table = self._layers.input(Names.EMBED, ONNX_DTYPES[stored], matrix_shape(text, Names.EMBED))
        ids = graph.reshape("input_ids", flat)
        if self._images:
            index = graph.reshape("image_index", flat)
            is_image = graph.op("GreaterOrEqual", index, graph.constant(0, np.int32))
            ids = graph.op("Where", is_image, graph.constant(0, np.int32), ids)
        rows = graph.op("Gather", table, ids, axis=0)
        if stored in LARGEST:
            rows = graph.op("DequantizeLinear", rows, graph.constant(1.0, np.float32))
            scale = self._layers.input(Names.scale(Names.EMBED), TensorProto.FLOAT, [text.vocab_size])
            rows = graph.op("Mul", rows, graph.op("Unsqueeze", graph.op("Gather", scale, ids, axis=0), graph.ints(1)))
        elif stored != "fp32":
            rows = graph.cast(rows, TensorProto.FLOAT)
        stream = graph.op("Mul", rows, graph.constant(np.sqrt(text.hidden_size), np.float32))
        if not self._images:
            return stream
        features = graph.op("Gather", "image_features", graph.op("Max", index, graph.constant(0, np.int32)), axis=0)
        return graph.op("Where", graph.op("Unsqueeze", is_image, graph.ints(1)), features, stream)

    def _attention(self, packed: Value, layer: int, rotation: tuple[Value, Value], mask: Value) -> Value:
        """Packed q, k, v [B·S, …] → attention's output [B·S, H·hd], activations; keys and values are appended."""
        graph, text, cache = self._graph, self._text, CacheNames.of(layer)
        batch = graph.op("Shape", "input_ids")
        shape = graph.op("Concat", batch, graph.ints(-1, text.head_dim), axis=0)
        heads = graph.op("Transpose", graph.reshape(packed, shape), perm=[0, 2, 1, 3])  # [B, H + 2·KV, S, hd]
        counts = graph.ints(text.num_heads, text.num_kv_heads, text.num_kv_heads)
        query, key, value = graph.ops("Split", heads, counts, outputs=3, axis=1)
        query, key = (
            graph.op("RotaryEmbedding", self._layers.norm(self._layers.widen(x), name, text.head_dim), *rotation)
            for x, name in (
                (query, Names.layer(layer, Names.Q_NORM)),
                (key, Names.layer(layer, Names.K_NORM)),
            )
        )
        dims: list[int | str] = ["B", text.num_kv_heads, self._capacity, text.head_dim]
        whole = []
        for new, past, present in (
            (self._layers.narrow(key), cache.past_key, cache.present_key),
            (value, cache.past_value, cache.present_value),
        ):
            graph.input(past, self._layers.dtype, dims)
            whole.append(graph.op("TensorScatter", past, new, self._past, axis=2, outputs=[present]))
            graph.output(present, self._layers.dtype, dims)
        # The query's norm holds the score's scale.
        attended = graph.op("Attention", self._layers.narrow(query), *whole, mask, scale=1.0)
        attended = graph.op("Transpose", attended, perm=[0, 2, 1, 3])
        return graph.reshape(attended, graph.ints(-1, text.num_heads * text.head_dim))

    def _head(self, stream: Value) -> None:
        graph, text = self._graph, self._text
        shape = graph.op("Shape", "logit_positions")
        first = graph.op("Mul", self._range(graph.op("Shape", "input_ids", end=1)), self._chunk)
        wanted = graph.cast("logit_positions", TensorProto.INT64)
        rows = graph.op("Add", graph.op("Unsqueeze", first, graph.ints(1)), wanted)
        stream = graph.op("Gather", stream, graph.reshape(rows, graph.ints(-1)), axis=0)
        name = Names.EMBED if text.tie_embeddings else Names.HEAD
        logits = self._layers.product(self._layers.norm(stream, Names.NORM), name, Names.HEAD)
        whole = graph.op("Concat", shape, graph.ints(text.vocab_size), axis=0)
        graph.op("Reshape", logits, whole, outputs=["logits"])
        graph.output("logits", TensorProto.FLOAT, ["B", "R", text.vocab_size])
