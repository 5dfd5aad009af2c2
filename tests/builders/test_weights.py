"""What a weight file holds is what ONNX Runtime reads back, under every name that refers to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from builders.weights import PAGE, WeightFile
from python_backends.errors import BuildError


class Matrix:
    """An array as a lazy tensor."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values, np.float32)
        self.shape = self.values.shape

    def read(self, start: int = 0, stop: int | None = None) -> Any:
        return self.values[start:stop].copy()


def _read_back(folder: Path, tensors: list[onnx.TensorProto]) -> list[Any]:
    """The initializers as a session of ONNX Runtime sees them."""
    nodes = [helper.make_node("Identity", [tensor.name], [f"out.{tensor.name}"]) for tensor in tensors]
    outputs = [helper.make_tensor_value_info(f"out.{t.name}", t.data_type, list(t.dims)) for t in tensors]
    graph = helper.make_graph(nodes, "weights", [], outputs, initializer=tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    results: list[Any] = session.run(None, {})
    return results


def test_tensors_of_every_type_and_size_are_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 255, (3, 7), np.uint8),
        rng.standard_normal((300, 111)).astype(np.float32),
        rng.standard_normal((5,)).astype(np.float16),
        rng.integers(-9, 9, (1, 2), np.int64),
        rng.standard_normal((200, 999)).astype(np.float16),
    ]
    with WeightFile(tmp_path / "model.weights") as file:
        tensors = [file.add_array(f"w{index}", array) for index, array in enumerate(arrays)]
    for array, found in zip(arrays, _read_back(tmp_path, tensors), strict=True):
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_large_tensors_start_on_pages_so_that_they_can_be_mapped(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "model.weights") as file:
        file.add_array("small", np.ones(3, np.float32))
        large = file.add_array("large", np.ones((64, 1024), np.float32))
    offset = next(int(entry.value) for entry in large.external_data if entry.key == "offset")
    assert offset == PAGE


def test_chunks_become_one_tensor_and_their_bytes_are_reported(tmp_path: Path) -> None:
    rows = np.arange(70, dtype=np.float32).reshape(10, 7)
    seen: list[int] = []
    with WeightFile(tmp_path / "model.weights", seen.append) as file:
        tensor = file.add("w", TensorProto.FLOAT, (10, 7), (rows[start : start + 3] for start in range(0, 10, 3)))
    np.testing.assert_array_equal(_read_back(tmp_path, [tensor])[0], rows)
    assert seen == [84, 84, 84, 28]


@pytest.mark.parametrize("rows", [9, 11])
def test_chunks_that_do_not_fill_the_shape_are_refused(tmp_path: Path, rows: int) -> None:
    file = WeightFile(tmp_path / "model.weights")
    with pytest.raises(BuildError, match=r"w: \d+ bytes written for shape \[10, 7\]"), file:
        file.add("w", TensorProto.FLOAT, (10, 7), [np.ones((rows, 7), np.float32)])


def test_chunks_of_another_type_are_refused(tmp_path: Path) -> None:
    file = WeightFile(tmp_path / "model.weights")
    with pytest.raises(BuildError, match="got float64 for a tensor of float32"), file:
        file.add("w", TensorProto.FLOAT, (2,), [np.ones(2)])


def test_an_alias_is_the_same_bytes_in_another_shape(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8)
    with WeightFile(tmp_path / "model.weights") as file:
        tensor = file.add_array("w", values.reshape(2, 3, 4))
        alias = file.alias("w_rows", tensor, (2, 12))
        with pytest.raises(BuildError, match="does not hold the elements"):
            file.alias("w_wrong", tensor, (2, 13))
    assert (tmp_path / "model.weights").stat().st_size == 24
    np.testing.assert_array_equal(_read_back(tmp_path, [tensor, alias])[1], values.reshape(2, 12))


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_floating_point_tensors_are_converted_chunk_by_chunk(tmp_path: Path, dtype: int) -> None:
    weight = Matrix(np.random.default_rng(0).standard_normal((6000, 1001)))
    with WeightFile(tmp_path / "model.weights") as file:
        tensor = file.add_float("w", weight, dtype)
    wanted = weight.values.astype(helper.tensor_dtype_to_np_dtype(dtype))
    np.testing.assert_array_equal(_read_back(tmp_path, [tensor])[0], wanted)


@pytest.mark.parametrize("value", [65520.0, -1e6])
def test_a_weight_beyond_float16_is_refused_and_the_last_one_within_is_not(tmp_path: Path, value: float) -> None:
    with WeightFile(tmp_path / "model.weights") as file:
        file.add_float("w", Matrix([[65504.0, -65504.0]]), TensorProto.FLOAT16)
        with pytest.raises(BuildError, match="beyond float16's 65504; build with --precision fp32"):
            file.add_float("v", Matrix([[1.0, value]]), TensorProto.FLOAT16)


def test_bfloat16_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "model.weights") as file:
        stored = file.add_float("w", Matrix([[1.0, 1.003, -70100.0]]), TensorProto.BFLOAT16)
    assert stored.data_type == int(TensorProto.BFLOAT16)
    raw = np.fromfile(tmp_path / "model.weights", np.uint16).astype(np.uint32) << 16
    np.testing.assert_array_equal(raw.view(np.float32), [1.0, 1.0, -70144.0])
