"""The decoder's pieces bound to its weights do what kernels do, layer by layer, with ONNX Runtime in TensorRT's place.

The runner below executes the very graphs that plans are built from, over the same addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from builders.checkpoint import open_checkpoint
from builders.gpu_weights import write_gpu_weights
from builders.graph.pieces import write_pieces
from builders.quantize import PER_CHANNEL, Precision
from python_backends.runtime.gpu.device_weights import load_weights
from python_backends.runtime.gpu.interpreter import InterpreterDevice, host_view
from python_backends.runtime.gpu.launch import DTYPES, Tensor
from python_backends.runtime.gpu.plan_products import PlanProducts
from python_backends.runtime.gpu.plans import BETWEEN, PIECES, SIGNED_INT4, Plan, PlanTensor
from python_backends.runtime.gpu.products import KernelProducts
from python_backends.runtime.gpu.weights import Names, open_weights
from tests.checkpoints import tiny
from tests.driver import model_shape

KINDS = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.INT8: "i8",
    onnx.TensorProto.INT4: "i4",
}
TOKENS = 5


class OnnxRunner:
    """`Runner` of one piece on the CPU."""

    def __init__(self, name: str, path: Path) -> None:
        graph = onnx.load(path).graph
        self._elements = {v.name: v.type.tensor_type.elem_type for v in graph.input}
        inputs, outputs = (tuple(_tensor(value) for value in values) for values in (graph.input, graph.output))
        self.plan = Plan(name, path.name, "", inputs, outputs, (), {}, {}, 0, 0.0)
        self.bound: list[Mapping[str, Tensor]] = []
        self._path = path

    def scratch_bytes(self) -> int:
        return 0

    def use_scratch(self, scratch: Tensor) -> None:
        assert scratch.num_bytes

    def operation(self, bindings: Mapping[str, Tensor]) -> OnnxOperation:
        self.bound.append(bindings)
        read = {bindings[tensor.name].address for tensor in self.plan.inputs}
        assert not read & {bindings[tensor.name].address for tensor in self.plan.outputs}
        return OnnxOperation(self._path, self.plan, self._elements, bindings)

    def save(self) -> None: ...

    def close(self) -> None: ...


class OnnxOperation:
    def __init__(self, path: Path, plan: Plan, elements: dict[str, int], bindings: Mapping[str, Tensor]) -> None:
        self._path, self._plan, self._elements, self._bindings = path, plan, elements, bindings

    def issue(self, stream: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
        make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
        feeds = {}
        for tensor in self._plan.inputs:
            values = host_view(self._bindings[tensor.name])
            assert all(size in {extent, -1} for size, extent in zip(tensor.shape, values.shape, strict=True))
            raw = values.view(np.uint16) if tensor.dtype == "bf16" else values
            feeds[tensor.name] = make(np.ascontiguousarray(raw), self._elements[tensor.name])
        names = [tensor.name for tensor in self._plan.outputs]
        for tensor, found in zip(self._plan.outputs, session.run_with_ort_values(names, feeds), strict=True):
            target = self._bindings[tensor.name]
            assert tuple(found.shape()) == target.shape
            assert tensor.dtype == target.dtype
            ctypes.memmove(target.address, found.data_ptr(), target.num_bytes)


def _tensor(value: onnx.ValueInfoProto) -> PlanTensor:
    kind = value.type.tensor_type
    return PlanTensor(value.name, KINDS[kind.elem_type], tuple(d.dim_value or -1 for d in kind.shape.dim))


def products(
    folder: Path, precision: Any
) -> tuple[InterpreterDevice, KernelProducts, PlanProducts, dict[str, OnnxRunner]]:
    checkpoint = open_checkpoint(tiny("1b"))
    block = PER_CHANNEL if precision == "int8" else None
    write_gpu_weights(checkpoint, Precision.of(precision, block), folder)
    device, model = InterpreterDevice(), model_shape(checkpoint.config)
    weights = load_weights(device, open_weights(folder))
    kernels = KernelProducts(device, model, weights, TOKENS)
    paths = write_pieces(checkpoint.config.text, precision, folder)
    runners = {name: OnnxRunner(name, paths[name]) for name in PIECES}
    return device, kernels, PlanProducts(device, model, weights, runners, TOKENS, kernels), runners


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 3e-3), ("int8", 0.03)])
def test_a_stream_through_all_layers_comes_out_as_from_the_kernels(
    tmp_path: Path, precision: Any, tolerance: float
) -> None:
    device, kernels, plans, _ = products(tmp_path, precision)
    config = open_checkpoint(tiny("1b")).config.text
    rng = np.random.default_rng(0)
    start = rng.standard_normal((TOKENS, config.hidden_size)).astype(np.float32)
    dtype = open_weights(tmp_path).activation
    attended = device.allocate(dtype, TOKENS, config.num_heads * config.head_dim)
    given = [rng.standard_normal(attended.shape).astype(DTYPES[dtype]) for _ in range(config.num_layers)]
    found: list[list[Any]] = []
    for of in (kernels, plans):
        stream = device.allocate("fp32", *start.shape)
        device.write(stream, start)
        steps, packed = of.first(TOKENS, stream)
        device.record(steps).replay()
        results = []
        for layer in range(config.num_layers):
            assert packed is not None
            values = device.read(packed).astype(np.float32)
            results.append(values.sum(0) if values.ndim == 3 else values)
            device.write(attended, given[layer])
            steps, packed = of.between(layer, TOKENS, attended, stream)
            device.record(steps).replay()
        assert packed is None
        found.append([*results, device.read(stream)])
    for ours, theirs in zip(*found, strict=True):
        assert np.linalg.norm(theirs - ours) <= tolerance * np.linalg.norm(ours)


def test_four_bit_matrices_are_bound_signed_and_once_however_often_a_layer_runs(tmp_path: Path) -> None:
    device, _, plans, runners = products(tmp_path, "int4")
    weights, text = open_weights(tmp_path), open_checkpoint(tiny("1b")).config.text
    attended = device.allocate("bf16", 2, text.num_heads * text.head_dim)
    stream = device.allocate("fp32", 2, text.hidden_size)
    for _ in range(2):
        plans.between(3, 2, attended, stream)
    first, second = (bound[Names.DOWN] for bound in runners[BETWEEN].bound)
    assert first == second
    np.testing.assert_array_equal(host_view(first), weights.read(Names.layer(3, Names.DOWN)) ^ SIGNED_INT4)
    np.testing.assert_array_equal(host_view(runners[BETWEEN].bound[0][Names.QKV]), weights.read("layers.4.qkv"))
    np.testing.assert_array_equal(host_view(runners[BETWEEN].bound[0][Names.O]), weights.read("layers.3.o"))
