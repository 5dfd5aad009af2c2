"""Runs graphs of the standard dialect with ONNX Runtime on the CPU, their weights taken from a GPU weight file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from builders.checkpoint import open_checkpoint
from builders.gpu_weights import write_gpu_weights
from builders.quantize import PER_CHANNEL, Precision
from python_backends.runtime.gpu.plans import SIGNED_INT4
from python_backends.runtime.gpu.weights import GROUP, GpuWeights, Names, open_weights


def gpu_weights(checkpoint: Path, folder: Path, precision: Any) -> GpuWeights:
    block = PER_CHANNEL if precision == "int8" else None
    write_gpu_weights(open_checkpoint(checkpoint), Precision.of(precision, block), folder)
    return open_weights(folder)


def dequantized(weights: GpuWeights, name: str, columns: int) -> Any:
    """A matrix [N, K] as float32."""
    values = weights.read(name)
    if values.dtype == np.uint8:
        halves = np.stack([values & 15, values >> 4], -1).reshape(len(values), -1)[:, :columns]
        scale = np.repeat(weights.read(Names.scale(name)).astype(np.float32), GROUP, 1)[:, :columns]
        return (halves.astype(np.float32) - 8) * scale
    scale = weights.read(Names.scale(name))[:, None] if Names.scale(name) in weights else np.float32(1)
    return values.astype(np.float32) * scale


def session(
    path: Path, weights: GpuWeights, stored: Callable[[str], str], *, wide: bool = False
) -> onnxruntime.InferenceSession:
    """The graph with those inputs that ``stored`` finds in the weight file as constants; ``wide`` dequantizes them."""
    model = onnx.load(path)
    for value in list(model.graph.input):
        name = stored(value.name)
        if name in weights:
            kind = value.type.tensor_type
            dims = [extent.dim_value for extent in kind.shape.dim]
            raw = dequantized(weights, name, dims[-1]) if wide and len(dims) > 1 else weights.read(name)
            raw = raw ^ SIGNED_INT4 if kind.elem_type == TensorProto.INT4 else raw
            tensor = TensorProto(name=value.name, data_type=kind.elem_type, dims=dims, raw_data=raw.tobytes())
            model.graph.initializer.append(tensor)
            model.graph.input.remove(value)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the graph as it stands
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # TensorScatter warns of every copy of a cache
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(graph: onnxruntime.InferenceSession, **inputs: Any) -> dict[str, Any]:
    """Outputs by name; inputs are converted to what the graph takes."""
    kinds = {value.name: value.type for value in graph.get_inputs()}
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}
    dtypes |= {"tensor(uint8)": np.uint8}
    feeds = {name: np.asarray(value).astype(dtypes[kinds[name]]) for name, value in inputs.items()}
    return dict(zip([value.name for value in graph.get_outputs()], graph.run(None, feeds), strict=True))


def relative_error(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))


def element_type(path: Path, name: str) -> str:
    """ONNX's name of the element type of an input or output."""
    graph = onnx.load(path).graph
    (found,) = (value for value in [*graph.input, *graph.output] if value.name == name)
    return helper.tensor_dtype_to_string(found.type.tensor_type.elem_type).removeprefix("TensorProto.")
