"""Whether the compiled library multiplies correctly on this machine: a random product through every kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from python_backends.errors import InternalError
from python_backends.runtime.kernels.graph import DOMAIN

_ROWS = (1, 20, 100)
"""One for each kernel: vector instructions, int8 tiles, bfloat16 tiles."""
_COLUMNS, _INNER = 80, 200
_TOLERANCE = 0.03
"""Error of the product relative to its size; rounding activations to int8 makes less than 0.01."""


def check(library: Path) -> None:
    """Multiply and compare with NumPy.

    Raises:
        InternalError: the library cannot be loaded, or its answers are wrong.
    """
    random = np.random.default_rng(0)
    for bits, block, asymmetric in ((4, 32, False), (4, 128, True), (8, 64, False)):
        blocks = -(-_INNER // block)
        data = random.integers(0, 256, (_COLUMNS, blocks, block * bits // 8), np.uint8)
        scales = random.normal(size=(_COLUMNS, blocks)).astype(np.float32)
        zeros = random.integers(0, 256, (_COLUMNS, -(-blocks * bits // 8)), np.uint8) if asymmetric else None
        wanted = _dequantize(data, scales, zeros, bits).T
        session = _session(library, data, scales, zeros, bits, block)
        for rows in _ROWS:
            x = random.normal(size=(rows, _INNER)).astype(np.float32)
            product = session.run(None, {"A": x})[0]
            error = np.linalg.norm(product - x @ wanted) / np.linalg.norm(x @ wanted)
            if not error < _TOLERANCE:
                raise InternalError(f"{rows} rows times {bits}-bit weights are off by {error:.3g}")


def _session(
    library: Path,
    data: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.uint8] | None,
    bits: int,
    block: int,
) -> onnxruntime.InferenceSession:
    constants = {"B": data, "scales": scales} | ({} if zeros is None else {"zero_points": zeros})
    sizes = {"K": _INNER, "N": _COLUMNS, "bits": bits, "block_size": block, "threads": 1}
    node = helper.make_node("QuantizedMatMul", ["A", *constants], ["Y"], domain=DOMAIN, **sizes)
    graph = helper.make_graph(
        [node],
        "check",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["M", _INNER])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["M", _COLUMNS])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        options.register_custom_ops_library(str(library))
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the module's exceptions share no base class of their own
        raise InternalError(f"{library} cannot be loaded: {error}") from error


def _dequantize(
    data: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray[np.uint8] | None, bits: int
) -> NDArray[np.float64]:
    """[N, K] as MatMulNBits defines it."""
    rows, blocks = scales.shape
    values = _unpack(data.reshape(rows, -1), bits).reshape(rows, blocks, -1).astype(np.float64)
    middle = 2 ** (bits - 1) if zeros is None else _unpack(zeros, bits)[:, :blocks, None].astype(np.float64)
    weights: NDArray[np.float64] = ((values - middle) * scales[:, :, None]).reshape(rows, -1)[:, :_INNER]
    return weights


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[N, bytes] → [N, values], the lower half of a byte first."""
    if bits == 8:
        return packed
    halves: NDArray[np.uint8] = np.stack([packed & 15, packed >> 4], axis=-1)
    return halves.reshape(len(packed), -1)
