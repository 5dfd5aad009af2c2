"""Linear layers and embeddings in every precision of ONNX Runtime.

Activations enter and leave in float32. Weights keep the checkpoint's [out, in] layout (``Gemm`` with ``transB``,
``MatMulNBits``), which is both what the file holds and the faster one to read for a single row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from builders.checkpoint import LazyTensor
from builders.graph.writer import CONTRIB, GraphWriter, Value
from builders.quantize import FLOATS, Packed, Precision, pack_linear

_HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Matrix:
    """A weight [N, K] in the weight file, ready to multiply with or to look rows up in."""

    rows: int
    columns: int
    packed: Packed


class Linears:
    """Stores matrices in one precision and applies them."""

    def __init__(self, graph: GraphWriter, precision: Precision, accuracy_level: int) -> None:
        """``accuracy_level`` is MatMulNBits's: 0 multiplies in float32, 4 rounds activations to int8 per block."""
        self._graph = graph
        self._precision = precision
        self._accuracy_level = accuracy_level

    def store(self, weight: LazyTensor, name: str) -> Matrix:
        """Stream a weight [N, K] to the weight file."""
        rows, columns = weight.shape
        packed = pack_linear(weight, self._precision, self._graph.weights, name)
        for tensor in packed:
            if tensor is not None:
                self._graph.stored(tensor)
        return Matrix(rows, columns, packed)

    def apply(self, x: Value, matrix: Matrix, bias: Value = "") -> Value:
        """``x · Wᵀ + bias`` of x [T, K] float32 → [T, N] float32; the bias is float32 [N]."""
        graph, weight = self._graph, matrix.packed.data.name
        if self._precision.quantized:
            return self._apply_quantized(x, matrix, bias)
        if self._precision.name == "fp32":
            return graph.op("Gemm", x, weight, *([bias] if bias else []), transB=1)
        if self._precision.name == "fp16":
            # Float16 ends at 65504: an input beyond it (a gated activation) is clamped, not turned into infinity.
            low, high = (graph.constant(limit, np.float32) for limit in (-_HALF_MAX, _HALF_MAX))
            x = graph.op("Clip", x, low, high)
        half = graph.cast(x, FLOATS[self._precision.name])
        product = graph.cast(graph.op("Gemm", half, weight, transB=1), TensorProto.FLOAT)
        return graph.op("Add", product, bias) if bias else product

    def logits(self, x: Value, matrix: Matrix, name: Value) -> Value:
        """``x · Wᵀ`` of x [B, R, K] as the graph output ``name`` [B, R, N].

        A node of its own that reshaped to an output would copy the vocabulary of every row.
        """
        if self._precision.quantized:
            return self._apply_quantized(x, matrix, "", outputs=[name])
        graph = self._graph
        rows = self.apply(graph.reshape(x, graph.ints(-1, matrix.columns)), matrix)
        shape = graph.op("Concat", graph.op("Shape", x, end=2), graph.ints(-1), axis=0)
        return graph.op("Reshape", rows, shape, outputs=[name])

    def _apply_quantized(self, x: Value, matrix: Matrix, bias: Value, outputs: Sequence[Value] = ()) -> Value:
        packed = matrix.packed
        inputs = [tensor.name if tensor is not None else "" for tensor in packed]
        inputs += ["", bias] if bias else []
        return self._graph.op(
            "MatMulNBits",
            x,
            *inputs,
            domain=CONTRIB,
            outputs=outputs,
            K=matrix.columns,
            N=matrix.rows,
            bits=self._precision.bits,
            block_size=self._precision.block_size(matrix.columns),
            accuracy_level=self._accuracy_level,
        )

    def lookup(self, ids: Value, matrix: Matrix) -> Value:
        """Rows ``ids`` [T] int32 of a matrix [V, D] as float32 [T, D]."""
        graph, packed = self._graph, matrix.packed
        if not self._precision.quantized:
            rows = graph.op("Gather", packed.data.name, ids, axis=0)
            return rows if self._precision.name == "fp32" else graph.cast(rows, TensorProto.FLOAT)
        # The same bytes as the head's, seen as rows: no second copy of the largest matrix.
        width = math.prod(packed.data.dims[1:])
        flat = graph.stored(graph.weights.alias(f"{packed.data.name}.rows", packed.data, [matrix.rows, width]))
        parameters = [tensor.name for tensor in (packed.scales, packed.zero_points) if tensor is not None]
        rows = graph.op(
            "GatherBlockQuantized",
            flat,
            ids,
            *parameters,
            domain=CONTRIB,
            bits=self._precision.bits,
            block_size=self._precision.block_size(matrix.columns),
            gather_axis=0,
            quantize_axis=1,
        )
        if matrix.columns % self._precision.block_size(matrix.columns) == 0:
            return rows
        return graph.op("Slice", rows, graph.ints(0), graph.ints(matrix.columns), graph.ints(1))
