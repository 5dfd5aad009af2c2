"""The decoder's graph as ONNX Runtime's CUDA kernels take it. Weights stay in their file: only the graph is read.

What a build writes is for the CPU. Four things are other on a GPU:

- GroupQueryAttention counts a row's valid tokens in an input that not every version knows. Steps come without padding
  and without idle rows there (`rows.unpadded`), so the input goes.
- GroupQueryAttention reads the length of the longest row on the host before it is issued, so it becomes an input:
  computed in the graph it would be on its way from the device.
- GroupQueryAttention has kernels for float16 and bfloat16. Over float32 caches, which then hold the whole context in
  local layers, too, it becomes plain products: made to compare with, not to be fast.
- Attention under a mask, which only the rows of images need, becomes plain products as well: its kernels take masks
  and grouped heads in some versions alone.

Every node that touches a cache has a CUDA kernel, so that none of it passes through the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike
from onnx import TensorProto, helper, numpy_helper

TOTAL_LENGTH = "total_length"
"""Input of the rewritten graph, int32 []: tokens of the longest row, the chunk's included."""
_TOTAL_LENGTH, _QUERY_LEN = 6, 16
"""GroupQueryAttention's inputs for the longest row's tokens and for the number of valid ones."""
_LOWEST = float(np.finfo(np.float32).min)


def rewrite_for_cuda(path: Path) -> bytes:
    """The model at ``path``; its initializers still name the weight file relative to it.

    A session made from the bytes needs ``session.model_external_initializers_file_folder_path``.
    """
    model = onnx.load(str(path), load_external_data=False)
    writer = _Writer(model.graph)
    for graph in _graphs(model.graph):
        writer.exchange(graph, "Attention", writer.masked_attention)
    if needs_whole_caches(writer.cache_type):
        writer.exchange(model.graph, "GroupQueryAttention", writer.cached_attention)
    cached = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    for node in cached:
        _drop_query_len(node)
        node.input[_TOTAL_LENGTH] = TOTAL_LENGTH
    if cached:
        model.graph.input.append(helper.make_tensor_value_info(TOTAL_LENGTH, TensorProto.INT32, []))
    return bytes(model.SerializeToString())


def needs_whole_caches(cache_type: int) -> bool:
    """Whether the caches of local layers must hold the whole context, as plain products want it.

    ``cache_type`` is an ``onnx.TensorProto`` element type.
    """
    return cache_type == int(TensorProto.FLOAT)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The bodies of a graph's control flow, of whatever level, each before what it lies in, and the graph itself."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
    yield graph


def _drop_query_len(node: onnx.NodeProto) -> None:
    kept = list(node.input)[:_QUERY_LEN]
    while not kept[-1]:
        kept.pop()
    del node.input[:]
    node.input.extend(kept)


@dataclass(frozen=True)
class _Positions:
    """What all cached attentions of a step share."""

    indices: str
    """int64 [B, kv_heads, S, 3]: where the chunk's rows go in a cache."""
    queries: str
    """int64 [B, S, 1]: positions of the chunk's tokens."""
    keys: str
    """int64 [T]: positions in the caches up to the longest row's end."""
    length: str
    """int64 [1]: T."""
    masks: dict[int, str]
    """By window (−1: none), as they are made: bool [B, 1, S, T], True where a query sees a key."""


class _Writer:
    """Writes nodes into one model. Constants become initializers of the outermost graph."""

    def __init__(self, root: onnx.GraphProto) -> None:
        self._root = root
        self._made: list[onnx.NodeProto] = []
        self._count = 0
        self._positions: _Positions | None = None
        past = next(value for value in root.input if value.name == "past_key.0")
        self.cache_type = int(past.type.tensor_type.elem_type)
        self._kv_heads, self._head_dim = (past.type.tensor_type.shape.dim[axis].dim_value for axis in (1, 3))

    def exchange(self, graph: onnx.GraphProto, kind: str, write: Callable[[onnx.NodeProto], None]) -> None:
        """Put what ``write`` makes in the place of every node of a kind."""
        if all(node.op_type != kind for node in graph.node):
            return
        result = onnx.GraphProto()
        for node in graph.node:
            if node.op_type == kind:
                write(node)
            else:
                self._made.append(node)
            result.node.extend(self._made)
            self._made = []
        del graph.node[:]
        graph.node.extend(result.node)

    # --- attention --------------------------------------------------------------------------------------------

    def masked_attention(self, node: onnx.NodeProto) -> None:
        """The standard Attention over [B, heads, S, D] under a mask [B, 1, S, T], with a scale of 1."""
        query, keys, values, mask = node.input[:4]
        self._attend(query, keys, values, mask, output=node.output[0])

    def cached_attention(self, node: onnx.NodeProto) -> None:
        """GroupQueryAttention over unpadded chunks: the caches get the new rows in place, then are read."""
        query, key, value, past_key, past_value, _, bound = node.input[:7]
        output, *presents = node.output
        window = next((item.i for item in node.attribute if item.name == "local_window_size"), -1)
        shared = self._shared(bound)
        read = []
        for new, past, present in zip((key, value), (past_key, past_value), presents, strict=True):
            self._op("ScatterND", past, shared.indices, self._by_head(new), output=present)
            read.append(self._op("Slice", present, self._ints(0), shared.length, self._ints(2)))
        rows = self._attend(self._by_head(query), read[0], read[1], self._mask(shared, window))
        rows = self._op("Transpose", rows, perm=[0, 2, 1, 3])
        self._op("Reshape", rows, self._op("Shape", query), output=output)

    def _attend(self, query: str, keys: str, values: str, mask: str, output: str = "") -> str:
        """[B, heads, S, D] of a query of that shape over keys and values [B, kv_heads, T, D], all float32."""
        length = self._op("Shape", mask, start=2)  # [S, T]
        total = self._op("Shape", mask, start=3)
        groups = self._ints(0, self._kv_heads, -1)
        grouped = self._op("Reshape", query, self._ints(0, self._kv_heads, -1, self._head_dim))
        scores = self._op("MatMul", grouped, self._op("Transpose", keys, perm=[0, 1, 3, 2]))
        by_group = self._op("Concat", groups, length, axis=0)
        scores = self._op("Reshape", scores, by_group)  # [B, kv_heads, group, S, T]
        seen = self._op("Unsqueeze", mask, self._ints(1))
        shares = self._op("Softmax", self._op("Where", seen, scores, self._constant(_LOWEST, np.float32)), axis=-1)
        shares = self._op("Reshape", shares, self._op("Concat", groups, total, axis=0))
        return self._op("Reshape", self._op("MatMul", shares, values), self._op("Shape", query), output=output)

    def _mask(self, shared: _Positions, window: int) -> str:
        if window not in shared.masks:
            seen = self._op("LessOrEqual", shared.keys, shared.queries)
            if window > 0:
                reach = self._op("Sub", shared.queries, self._constant(window, np.int64))
                seen = self._op("And", seen, self._op("Greater", shared.keys, reach))
            shared.masks[window] = self._op("Unsqueeze", seen, self._ints(1))
        return shared.masks[window]

    def _shared(self, bound: str) -> _Positions:
        """Made in front of the first attention; ``bound`` is its scalar for the longest row's end."""
        if self._positions is None:
            batch, chunk = (self._op("Shape", "input_ids", start=axis, end=axis + 1) for axis in (0, 1))
            past = self._op("Unsqueeze", self._op("Cast", "past_len", to=TensorProto.INT64), self._ints(1))
            positions = self._op("Add", past, self._range(chunk))
            shape = self._op("Concat", batch, self._ints(self._kv_heads), chunk, axis=0)
            axes = (
                self._op("Unsqueeze", self._range(batch), self._ints(1, 2)),
                self._constant(np.arange(self._kv_heads).reshape(1, -1, 1), np.int64),
                self._op("Unsqueeze", positions, self._ints(1)),
            )
            columns = [self._op("Unsqueeze", self._op("Expand", axis, shape), self._ints(3)) for axis in axes]
            length = self._op("Reshape", self._op("Cast", bound, to=TensorProto.INT64), self._ints(1))
            self._positions = _Positions(
                indices=self._op("Concat", *columns, axis=3),
                queries=self._op("Unsqueeze", positions, self._ints(2)),
                keys=self._range(length),
                length=length,
                masks={},
            )
        return self._positions

    # --- nodes ------------------------------------------------------------------------------------------------

    def _op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Append a node with one output, named ``output`` or afresh; returns the name."""
        name = output or self._fresh(kind)
        self._made.append(helper.make_node(kind, list(inputs), [name], name=f"{kind}:{name}", **attributes))
        return name

    def _by_head(self, value: str) -> str:
        """[B, S, heads·D] → [B, heads, S, D]."""
        return self._op(
            "Transpose", self._op("Reshape", value, self._ints(0, 0, -1, self._head_dim)), perm=[0, 2, 1, 3]
        )

    def _range(self, length: str) -> str:
        """int64 [n]: 0 … n − 1; ``length`` is int64 [1]."""
        zero, one = self._constant(0, np.int64), self._constant(1, np.int64)
        return self._op("Range", zero, self._op("Squeeze", length), one)

    def _ints(self, *values: int) -> str:
        return self._constant(values, np.int64)

    def _constant(self, values: ArrayLike, dtype: DTypeLike) -> str:
        name = self._fresh("constant")
        self._root.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def _fresh(self, hint: str) -> str:
        self._count += 1
        return f"cuda_{hint}_{self._count}"
