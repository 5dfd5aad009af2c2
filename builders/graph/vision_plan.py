"""The vision encoder in the standard dialect, for a TensorRT plan of its own that Triton can also serve by itself.

Same input and output as `builders.graph.vision`. Unlike the decoder's plans it holds its weights: a tower is small
beside the decoder, and a plan that is a model by itself needs them. The stream and norms are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from builders.checkpoint import Checkpoint
from builders.gpu_weights import narrow, quantize_fp8, quantize_int8
from builders.graph.standard import ONNX_DTYPES, quantized_product
from builders.graph.vision import RESCALE, VisionEncoder, vision_config
from builders.graph.writer import STANDARD_OPSET, GraphWriter, Value
from builders.quantize import PrecisionName, map_chunks
from builders.tensors import LazyTensor
from builders.weights import WeightFile
from python_backends.runtime.gpu.plans import VISION
from python_backends.runtime.gpu.weights import Names

_WEIGHT_FILE = f"{VISION}.weights"
_QUANTIZERS = {"fp8": quantize_fp8, "int8": quantize_int8}


def write_vision_graph(
    checkpoint: Checkpoint, precision: PrecisionName, folder: Path, *, activation: str | None = None
) -> Path:
    """Write ``vision_encoder.onnx`` and its weights into ``folder``; returns the graph.

    With int4 the tower's weights are int8, as for ONNX Runtime. ``activation`` (fp32, bf16 or fp16) replaces the type
    of what products in sixteen bits and attention read; it is bf16 except in fp16.

    Raises:
        BuildError: a text-only checkpoint, one that cannot be read, or a weight beyond fp16's range.
        OSError: the disk is full.
    """
    config = vision_config(checkpoint)
    stored = "int8" if precision == "int4" else precision
    activation = activation or ("fp16" if precision == "fp16" else "bf16")
    with WeightFile(folder / _WEIGHT_FILE) as weights:
        graph = GraphWriter(weights, opset=STANDARD_OPSET)
        products = _Products(graph, stored if stored in _QUANTIZERS else activation, activation)
        _VisionPlan(graph, checkpoint, config, products).write()
        path = folder / f"{VISION}.onnx"
        graph.save(path)
    return path


class _Matrix:
    """A weight [N, K] in the weight file."""

    def __init__(self, data: Value, scale: Value) -> None:
        self.data, self.scale = data, scale


class _Products:
    """`Products` of the standard dialect."""

    def __init__(self, graph: GraphWriter, stored: str, activation: str) -> None:
        self._graph, self._stored, self._activation = graph, stored, activation
        self.dtype = ONNX_DTYPES[activation]  # type: ignore[index]

    def store(self, weight: LazyTensor, name: str) -> _Matrix:
        """See `Products.store`."""
        graph, dtype = self._graph, ONNX_DTYPES[self._stored]  # type: ignore[index]
        if self._stored not in _QUANTIZERS:
            return _Matrix(self.plain(weight, name), "")
        scales: list[NDArray[np.float32]] = []

        def data() -> Iterator[NDArray[Any]]:
            for values, scale in map_chunks(weight, _QUANTIZERS[self._stored]):
                scales.append(scale)
                yield values

        stored = graph.stored(graph.weights.add(name, dtype, weight.shape, data()))
        scale = graph.weights.add_array(Names.scale(name), np.concatenate(scales))
        return _Matrix(stored, graph.stored(scale))

    def plain(self, weight: LazyTensor, name: str) -> Value:
        """A tensor stored in the activations' type."""
        pieces = map_chunks(weight, lambda values: narrow(name, values, self._activation))
        return self._graph.stored(self._graph.weights.add(name, self.dtype, weight.shape, pieces))

    def apply(self, x: Value, matrix: _Matrix, bias: Value = "") -> Value:
        """See `Products.apply`."""
        graph = self._graph
        if matrix.scale:
            product = quantized_product(graph, x, matrix.data, matrix.scale, self._stored)  # type: ignore[arg-type]
        else:
            weight = graph.op("Transpose", matrix.data, perm=[1, 0])
            product = self.widen(graph.op("MatMul", self.narrow(x), weight))
        return graph.op("Add", product, bias) if bias else product

    def narrow(self, x: Value) -> Value:
        """Float32 values as activations."""
        return x if self.dtype == TensorProto.FLOAT else self._graph.cast(x, self.dtype)

    def widen(self, x: Value) -> Value:
        """Activations as float32."""
        return x if self.dtype == TensorProto.FLOAT else self._graph.cast(x, TensorProto.FLOAT)


class _VisionPlan(VisionEncoder[_Matrix]):
    _linears: _Products

    def rescaled(self, pixels: Value) -> Value:
        # TensorRT has no float64; the difference is one unit in the last place of float32.
        graph = self._graph
        return graph.op("Mul", graph.cast(pixels, TensorProto.FLOAT), graph.constant(RESCALE, np.float32))

    def patches(self, x: Value, name: str) -> Value:
        kernel = self._linears.plain(self._checkpoint.tensor(f"{name}.weight"), f"{name}.weight")
        bias = self._linears.plain(self._checkpoint.tensor(f"{name}.bias"), f"{name}.bias")
        strides = [self._config.patch_size] * 2
        return self._linears.widen(self._graph.op("Conv", self._linears.narrow(x), kernel, bias, strides=strides))

    def attention(self, packed: Value) -> Value:
        graph, config = self._graph, self._config
        heads, width = config.num_heads, config.hidden_size // config.num_heads
        by_head = graph.reshape(
            self._linears.narrow(packed), graph.ints(-1, config.patches_per_side**2, 3 * heads, width)
        )
        by_head = graph.op("Transpose", by_head, perm=[0, 2, 1, 3])
        parts = graph.ops("Split", by_head, graph.ints(heads, heads, heads), outputs=3, axis=1)
        x = graph.op("Transpose", graph.op("Attention", *parts, scale=width**-0.5), perm=[0, 2, 1, 3])
        return self._linears.widen(graph.reshape(x, self._rows))
