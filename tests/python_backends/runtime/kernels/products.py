"""Quantized products as MatMulNBits nodes, and what they should compute."""

import dataclasses

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from builders.quantize import Quantized, dequantize
from python_backends.runtime.kernels.cpu import has_amx
from python_backends.runtime.kernels.graph import DOMAIN
from python_backends.runtime.kernels.rewrite import exchange

OPSETS = [("", 23), ("com.microsoft", 1), (DOMAIN, 1)]


@dataclasses.dataclass
class Weight:
    """A random quantized matrix [N, K]."""

    columns: int
    inner: int
    bits: int
    block: int
    quantized: Quantized

    @classmethod
    def random(cls, rng, columns, inner, bits=4, block=32, *, asymmetric=False, scale=0.01):
        blocks = -(-inner // block)
        data = rng.integers(0, 256, (columns, blocks, block * bits // 8), np.uint8)
        scales = (rng.normal(size=(columns, blocks)) * scale).astype(np.float32)
        zeros = rng.integers(0, 256, (columns, -(-blocks * bits // 8)), np.uint8) if asymmetric else None
        return cls(columns, inner, bits, block, Quantized(data, scales, zeros))

    def dense(self):
        """[N, K] float64."""
        return dequantize(self.quantized, self.inner, self.bits).astype(np.float64)

    def step(self):
        """[N, K] the size of one unit of a quantized weight."""
        return np.repeat(np.abs(self.quantized.scales.astype(np.float64)), self.block, axis=1)[:, : self.inner]

    def initializers(self, name):
        values = {"data": self.quantized.data, "scales": self.quantized.scales, "zeros": self.quantized.zero_points}
        return [numpy_helper.from_array(v, f"{name}.{key}") for key, v in values.items() if v is not None]

    def node(self, x, name, out, *, bias="", level=4):
        inputs = [x, f"{name}.data", f"{name}.scales"]
        inputs += [f"{name}.zeros"] if self.quantized.zero_points is not None else []
        if bias:
            inputs += [""] * (5 - len(inputs)) + [bias]
        sizes = {"K": self.inner, "N": self.columns, "bits": self.bits, "block_size": self.block}
        return helper.make_node(
            "MatMulNBits", inputs, [out], domain="com.microsoft", accuracy_level=level, **sizes, name=f"{name}.node"
        )


def graph_of(nodes, inputs, outputs, initializers, halves=()):
    """A graph of float32 inputs and outputs, but for the float16 outputs named in ``halves``."""
    return helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT16 if name in halves else TensorProto.FLOAT, shape)
            for name, shape in outputs.items()
        ],
        initializers,
    )


def session_of(graph, compiled, *, ours=True, threads=2):
    """A session over a copy of the graph, with its products exchanged or not, and how many were."""
    copy = onnx.GraphProto()
    copy.CopyFrom(graph)
    exchanged = exchange(copy, threads) if ours else 0
    opsets = [helper.make_opsetid(name, version) for name, version in OPSETS]
    model = helper.make_model(copy, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(compiled))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session, exchanged


def product_session(weight, compiled, *, bias=None, ours=True, threads=2):
    """x → Y of one product."""
    constants = weight.initializers("w") + ([] if bias is None else [numpy_helper.from_array(bias, "bias")])
    node = weight.node("x", "w", "y", bias="" if bias is None else "bias")
    graph = graph_of([node], {"x": ["M", weight.inner]}, {"y": ["M", weight.columns]}, constants)
    session, exchanged = session_of(graph, compiled, ours=ours, threads=threads)
    assert exchanged == ours
    return session


def multiply(session, x):
    return session.run(None, {"x": x})[0]


def rounding_bound(x, weight, rows):
    """[M, N] how far a product may be from the exact one.

    Up to 80 rows, and without AMX any number of them, activations are rounded to int8, by at most half of 1/127 of the
    largest of their block; above, both factors are rounded to bfloat16, by at most 2^-8 of their size (2^-9 each,
    weights and activations). Scales are rounded to float16, by 2^-11 of their size. Sums of float32 lose about 2^-22 of
    the sum of magnitudes.
    """
    dense = np.abs(weight.dense())
    magnitude = np.abs(x.astype(np.float64)) @ dense.T
    blocks = -(-weight.inner // weight.block)
    padded = np.pad(np.abs(x.astype(np.float64)), ((0, 0), (0, blocks * weight.block - weight.inner)))
    largest = padded.reshape(len(x), blocks, weight.block).max(-1)
    half_step = np.repeat(largest / 254, weight.block, axis=1)[:, : weight.inner]
    # The dot product of integers is taken before the zero point is subtracted, but exactly: only x is rounded.
    activations = half_step @ dense.T * 1.001 if rows <= 80 or not has_amx() else magnitude * 2.0**-7
    # Blocks below 1e-30 count as zero.
    return activations + magnitude * (2.0**-11 + 2.0**-20) + 1e-30 * weight.inner * weight.step().max() * 256
