"""Layers in the standard dialect, for TensorRT: norms, products, the feed-forward part, by standard operators alone.

The decoder's weights are graph inputs, named and laid out as in the GPU weight file (`runtime.gpu.weights`): a plan
holds none, so it is small, builds in bounded memory whatever the model's size, and one serves all layers. (A plan that
can be refitted instead does not build without a GPU.) Two layouts decide how fast weights in fewer bits are read:

- fp8 and int8 meet activations in the same eight bits, quantized per token in the graph: the matrix goes into the
  product as it lies. Weights that are widened first would be written to scratch memory by a kernel of their own.
- int4 is widened in every step, because TensorRT fuses that into the product for constants alone. Its bytes are signed,
  those of the weight file XOR `plans.SIGNED_INT4`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
from onnx import TensorProto

from builders.gpu_weights import ACTIVATIONS, Storage, storage
from builders.graph.writer import Dim, GraphWriter, Value
from builders.model_config import TextConfig
from builders.quantize import PrecisionName
from python_backends.runtime.gpu.weights import GROUP, Names

ONNX_DTYPES: dict[Storage, int] = {
    "fp32": TensorProto.FLOAT,
    "bf16": TensorProto.BFLOAT16,
    "fp16": TensorProto.FLOAT16,
    "fp8": TensorProto.FLOAT8E4M3FN,
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
}
LARGEST = {"fp8": float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max), "int8": 127.0}
"""What the largest activation of a token becomes."""

_HALF_MAX = float(np.finfo(np.float16).max)
_TINY = 1e-12


def matrix_shape(text: TextConfig, kind: str) -> tuple[int, int]:
    """[N, K] of the matrix ``kind`` of `Names`."""
    width, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    return {
        Names.EMBED: (text.vocab_size, text.hidden_size),
        Names.HEAD: (text.vocab_size, text.hidden_size),
        Names.QKV: (width + 2 * kv, text.hidden_size),
        Names.O: (text.hidden_size, width),
        Names.GATE_UP: (2 * text.intermediate_size, text.hidden_size),
        Names.DOWN: (text.hidden_size, text.intermediate_size),
    }[kind]


def quantized_product(graph: GraphWriter, x: Value, weight: Value, scale: Value, stored: Storage) -> Value:
    """x [M, K] float32 · weight [N, K] in eight bits with a scale [N] → float32 [M, N].

    Quantizing with a scale of 1 lets TensorRT see a product of eight-bit operands; what the scales do stays outside.
    """
    one = graph.constant(1.0, np.float32)
    zero = graph.constant(0, np.int8 if stored == "int8" else ml_dtypes.float8_e4m3fn)
    largest = graph.op("ReduceMax", graph.op("Abs", x), graph.ints(-1), keepdims=1)
    largest = graph.op("Max", largest, graph.constant(_TINY, np.float32))
    token_scale = graph.op("Div", largest, graph.constant(LARGEST[stored], np.float32))
    rounded = graph.op("QuantizeLinear", graph.op("Div", x, token_scale), one, zero)
    operands = [graph.op("DequantizeLinear", value, one) for value in (rounded, weight)]
    product = graph.op("MatMul", operands[0], graph.op("Transpose", operands[1], perm=[1, 0]))
    return graph.op("Mul", graph.op("Mul", product, scale), token_scale)


class StandardLayers:
    """A decoder's parts over weights that are graph inputs; the residual stream, norms and gates are float32."""

    def __init__(
        self, graph: GraphWriter, text: TextConfig, precision: PrecisionName, activation: str | None = None
    ) -> None:
        """``activation`` replaces the precision's element type of activations (`ACTIVATIONS`)."""
        self._graph, self._text, self._precision = graph, text, precision
        self._activation = activation or ACTIVATIONS[precision]
        self._declared: set[Value] = set()

    @property
    def dtype(self) -> int:
        """ONNX element type of activations."""
        return ONNX_DTYPES[self._activation]  # type: ignore[index]

    def input(self, name: str, dtype: int, shape: Sequence[Dim]) -> Value:
        """A graph input, declared once."""
        if name not in self._declared:
            self._declared.add(name)
            self._graph.input(name, dtype, shape)
        return name

    def norm(self, x: Value, name: str, size: int | None = None) -> Value:
        """RMS norm of float32 values over the last axis; the weight is 1 + w already."""
        gamma = self.input(name, TensorProto.FLOAT, [size or self._text.hidden_size])
        return self._graph.op("RMSNormalization", x, gamma, axis=-1, epsilon=self._text.rms_norm_eps)

    def product(self, x: Value, name: str, kind: str, *, is_narrow: bool = False, narrow: bool = False) -> Value:
        """x [M, K] · the matrix ``name`` of a kind in `Names` → [M, N].

        Both are float32, or activations: x with ``is_narrow``, the result with ``narrow``. TensorRT rounds a product of
        sixteen-bit operands to sixteen bits, whatever it is made into.
        """
        graph, stored = self._graph, storage(self._precision, kind)
        rows, columns = matrix_shape(self._text, kind)
        weight = self.input(name, ONNX_DTYPES[stored], [rows, columns])
        scale = Names.scale(name)
        if stored in LARGEST:
            x = self.widen(x) if is_narrow else x
            x = quantized_product(graph, x, weight, self.input(scale, TensorProto.FLOAT, [rows]), stored)
            return self.narrow(x) if narrow else x
        if stored == "int4":
            scale = self.input(scale, TensorProto.BFLOAT16, [rows, -(-columns // GROUP)])
            scale = scale if self.dtype == TensorProto.BFLOAT16 else graph.cast(scale, self.dtype)
            weight = graph.op("DequantizeLinear", weight, scale, axis=1, block_size=GROUP)
        elif ONNX_DTYPES[stored] != self.dtype:
            weight = graph.cast(weight, self.dtype)
        product = graph.op("MatMul", x if is_narrow else self.narrow(x), graph.op("Transpose", weight, perm=[1, 0]))
        return product if narrow else self.widen(product)

    def narrow(self, x: Value) -> Value:
        """Float32 values as activations. Float16 ends at 65504: what lies beyond is clamped, not made infinite."""
        if self.dtype == TensorProto.FLOAT:
            return x
        if self.dtype == TensorProto.FLOAT16:
            low, high = (self._graph.constant(limit, np.float32) for limit in (-_HALF_MAX, _HALF_MAX))
            x = self._graph.op("Min", self._graph.op("Max", x, low), high)
        return self._graph.cast(x, self.dtype)

    def widen(self, x: Value) -> Value:
        """Activations as float32."""
        return x if self.dtype == TensorProto.FLOAT else self._graph.cast(x, TensorProto.FLOAT)

    # --- parts of a layer -------------------------------------------------------------------------------------

    def projections(self, stream: Value, name: Callable[[str], str]) -> Value:
        """The stream [M, D] float32 → packed q, k, v [M, (H + 2·KV)·hd]. ``name`` gives a layer's tensors."""
        return self.product(self.norm(stream, name(Names.INPUT_NORM)), name(Names.QKV), Names.QKV, narrow=True)

    def behind_attention(self, attended: Value, stream: Value, name: Callable[[str], str]) -> Value:
        """Attention's output [M, H·hd] in activations and the stream [M, D] float32 → the stream behind the layer."""
        graph, text = self._graph, self._text
        x = self.product(attended, name(Names.O), Names.O, is_narrow=True)
        stream = graph.op("Add", stream, self.norm(x, name(Names.POST_ATTENTION_NORM)))
        x = self.norm(stream, name(Names.PRE_FEEDFORWARD_NORM))
        sixteen_bits = storage(self._precision, Names.GATE_UP) not in LARGEST
        x = self.product(x, name(Names.GATE_UP), Names.GATE_UP, narrow=sixteen_bits)
        gate, up = graph.ops("Split", x, graph.ints(*[text.intermediate_size] * 2), outputs=2, axis=1)
        if sixteen_bits:  # widened behind the split: before it TensorRT would merge the cast into a slower product
            gate, up = self.widen(gate), self.widen(up)
        x = graph.op("Mul", graph.op("Gelu", gate, approximate="tanh"), up)
        x = self.product(x, name(Names.DOWN), Names.DOWN)
        return graph.op("Add", stream, self.norm(x, name(Names.POST_FEEDFORWARD_NORM)))
