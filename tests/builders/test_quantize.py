"""Quantized weights mean the same to ONNX Runtime's operators as to the reference, and their error is bounded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from onnx import TensorProto, helper

from builders.quantize import PER_CHANNEL, Precision, dequantize, pack_linear, quantize
from builders.weights import WeightFile
from python_backends.errors import BuildError
from tests.builders.test_weights import Matrix

CONTRIB = "com.microsoft"
BITS = {"int4": 4, "int8": 8}
PRECISIONS = [
    Precision(name, block, symmetric)  # type: ignore[arg-type]
    for name, block, symmetric in itertools.product(BITS, (PER_CHANNEL, 16, 32, 128), (True, False))
]


def _weight(rows: int, columns: int, seed: int = 0) -> Any:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.05).astype(np.float32)


def _operators(folder: Path, weight: Any, precision: Precision) -> onnxruntime.InferenceSession:
    """x · Wᵀ and rows of W, both from the one copy of the weight in the file."""
    rows, columns = weight.shape
    with WeightFile(folder / "model.weights") as file:
        packed = pack_linear(Matrix(weight), precision, file, "w")
        assert packed.scales is not None
        _, blocks, blob = packed.data.dims
        flat = file.alias("w_rows", packed.data, (rows, blocks * blob))
    initializers = [tensor for tensor in (*packed, flat) if tensor is not None]
    quantization = [packed.scales.name] + ([packed.zero_points.name] if packed.zero_points is not None else [])
    common = {"domain": CONTRIB, "bits": precision.bits, "block_size": precision.block_size(columns)}
    nodes = [
        helper.make_node("MatMulNBits", ["x", "w", *quantization], ["y"], K=columns, N=rows, **common),
        helper.make_node("GatherBlockQuantized", ["w_rows", "i", *quantization], ["rows"], quantize_axis=1, **common),
    ]
    graph = helper.make_graph(
        nodes,
        "operators",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, columns]),
            helper.make_tensor_value_info("i", TensorProto.INT32, [None]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "rows")],
        initializer=initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("shape", [(48, 192), (7, 200), (5, 1152), (3, 269)])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_onnx_runtimes_operators_compute_with_the_reference_weights(
    tmp_path: Path, precision: Precision, shape: tuple[int, int]
) -> None:
    weight = _weight(*shape)
    reference = dequantize(quantize(weight, precision), shape[1], precision.bits)
    session = _operators(tmp_path, weight, precision)
    x = np.random.default_rng(1).standard_normal((3, shape[1])).astype(np.float32)
    y, rows = session.run(None, {"x": x, "i": np.arange(shape[0], dtype=np.int32)})
    np.testing.assert_array_equal(rows[:, : shape[1]], reference)
    np.testing.assert_array_equal(rows[:, shape[1] :], 0)
    np.testing.assert_allclose(y, x @ reference.T, rtol=0, atol=1e-5 * np.abs(y).max())


def _plain(weight: Any, precision: Precision) -> Any:
    """What absolute-maximum scales give: the largest weight on the largest integer."""
    top = 2 ** (precision.bits - 1) - 1
    units = weight.reshape(-1, precision.block or weight.shape[1])
    scale = np.abs(units).max(1, keepdims=True) / top
    scale[scale == 0] = 1
    return (np.clip(np.rint(units / scale), -top - 1, top) * scale).reshape(weight.shape)


FINITE = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@settings(deadline=None)
@given(
    weight=numpy_strategies.arrays(np.float32, (3, 64), elements=FINITE),
    precision=st.sampled_from([precision for precision in PRECISIONS if precision.block <= 64]),
)
def test_no_block_errs_more_than_an_even_grid_over_its_range(weight: Any, precision: Precision) -> None:
    quantized = quantize(weight, precision)
    found = dequantize(quantized, 64, precision.bits)
    width = precision.block or 64
    units, errors = weight.reshape(-1, width), (found - weight).reshape(-1, width)
    reach = np.maximum(units.max(1), 0) - np.minimum(units.min(1), 0)
    # Clipping may cost the largest weight more than a step, but never more than all of it.
    assert (np.abs(errors).max(1) <= reach * (1 + 1e-5) + 1e-30).all()
    squares = (errors.astype(np.float64) ** 2).sum(1)
    steps = 2**precision.bits - 1
    # An evenly spaced grid over the block's range errs by at most half a step a weight; the fit must not be worse.
    assert (squares <= width * (1.25 * reach / steps) ** 2 + 1e-20).all()


@pytest.mark.parametrize("distribution", ["normal", "laplace"])
@pytest.mark.parametrize("block", [32, 128, PER_CHANNEL])
def test_fitted_int4_scales_lose_a_quarter_less_than_absolute_maximum_scales(distribution: str, block: int) -> None:
    precision = Precision("int4", block)
    weight = getattr(np.random.default_rng(0), distribution)(size=(64, 2560)).astype(np.float32)
    found = dequantize(quantize(weight, precision), 2560, 4)
    ours, theirs = ((found - weight) ** 2).mean(), ((_plain(weight, precision) - weight) ** 2).mean()
    assert ours < 0.75 * theirs


@pytest.mark.parametrize(("precision", "limit"), [(Precision("int8"), 3.5e-5), (Precision("int4"), 7.5e-3)], ids=str)
def test_the_relative_error_on_normal_weights_is_known(precision: Precision, limit: float) -> None:
    weight = _weight(64, 2560)
    found = dequantize(quantize(weight, precision), 2560, precision.bits)
    assert ((found - weight) ** 2).sum() / (weight**2).sum() < limit


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -3e-3, 1e-38, 3e38])
def test_constant_rows_from_zero_to_the_largest_float_stay_what_they_are(precision: Precision, value: float) -> None:
    weight = np.full((3, 64), value, np.float32)
    weight[1] = 0
    found = dequantize(quantize(weight, precision), 64, precision.bits)
    # Below 1e-30 a block is stored as zeros.
    np.testing.assert_allclose(found, weight if abs(value) > 1e-30 else 0, rtol=1e-5, atol=1e-30)


def test_rows_do_not_depend_on_how_they_are_cut_into_chunks() -> None:
    weight = _weight(1000, 320)
    for precision in PRECISIONS:
        whole, parts = (
            quantize(weight, precision),
            [quantize(weight[i : i + 90], precision) for i in range(0, 1000, 90)],
        )
        np.testing.assert_array_equal(whole.data, np.concatenate([part.data for part in parts]))
        np.testing.assert_array_equal(whole.scales, np.concatenate([part.scales for part in parts]))


def test_the_weights_given_are_not_changed() -> None:
    weight = _weight(8, 100)
    before = weight.copy()
    for precision in PRECISIONS:
        quantize(weight, precision)
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize(
    ("block", "columns", "stored"), [(32, 2560, 32), (0, 2560, 256), (0, 1152, 128), (0, 4304, 32)]
)
def test_one_scale_per_channel_is_stored_in_blocks_that_the_operators_take(
    block: int, columns: int, stored: int
) -> None:
    assert Precision("int4", block).block_size(columns) == stored


@pytest.mark.parametrize("block", [8, 24, -32, 100])
def test_a_block_size_that_the_operators_do_not_take_is_refused(block: int) -> None:
    with pytest.raises(BuildError, match=f"block size {block} is not a power of two"):
        Precision("int4", block)


def test_an_unknown_precision_is_refused_with_the_choices() -> None:
    with pytest.raises(BuildError, match="choose one of fp32, bf16, fp16, fp8, int8, int4"):
        Precision("int3")  # type: ignore[arg-type]
