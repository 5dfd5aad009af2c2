"""Embedding and norms against the formulas in float64, with split products, eight-bit outputs, poisoned padding."""

from __future__ import annotations

import numpy as np
import pytest

from python_backends.runtime.gpu.interpreter import InterpreterDevice, host_view
from python_backends.runtime.gpu.kernels import embed, norm
from python_backends.runtime.gpu.kernels.norm import Quantized
from tests.python_backends.runtime.gpu.matrices import dequantized, random_matrix
from tests.python_backends.runtime.gpu.paged import Array, upload

EPSILON = 1e-6


def rms_norm(x: Array, gamma: Array) -> Array:
    wide = x.astype(np.float64)
    normed: Array = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPSILON) * gamma
    return normed


@pytest.fixture
def device() -> InterpreterDevice:
    return InterpreterDevice()


@pytest.mark.parametrize("storage", ["fp32", "bf16", "i8", "fp8e4nv", "u8"])
def test_embedding_rows_and_image_features(device: InterpreterDevice, storage: str) -> None:
    random = np.random.default_rng(1)
    table = random_matrix(device, storage, 50, 160, random)
    features = random.standard_normal((3, 160)).astype(np.float32)
    ids = np.array([[3, 49, 0], [7, 7, 1]])
    index = np.array([[-1, 2, -1], [0, -1, -1]])
    stream = device.allocate("fp32", 6, 160)
    device.launch(
        embed.embed(
            upload(device, "i32", ids),
            table,
            stream,
            scale=12.5,
            image_index=upload(device, "i32", index),
            features=upload(device, "fp32", features),
        )
    )
    expected = dequantized(table)[ids.reshape(-1)] * 12.5
    expected[[1, 3]] = features[[2, 0]]
    np.testing.assert_allclose(host_view(stream), expected, rtol=1e-6)


def test_text_alone_needs_no_image_arrays(device: InterpreterDevice) -> None:
    table = random_matrix(device, "fp16", 9, 32, np.random.default_rng(0))
    stream = device.allocate("fp32", 2, 32)
    device.launch(embed.embed(upload(device, "i32", np.array([[8], [1]])), table, stream, scale=2.0))
    np.testing.assert_allclose(host_view(stream), dequantized(table)[[8, 1]] * 2, rtol=1e-6)


@pytest.mark.parametrize(("columns", "dtype"), [(96, "fp32"), (64, "bf16")])
@pytest.mark.parametrize("split", [1, 3])
def test_a_sublayers_output_is_normed_added_and_the_stream_normed(
    device: InterpreterDevice, columns: int, dtype: str, split: int
) -> None:
    random = np.random.default_rng(split)
    parts = random.standard_normal((split, 5, columns)).astype(np.float32)
    start = random.standard_normal((5, columns)).astype(np.float32) * 3
    post, pre = (random.uniform(0.1, 2, columns).astype(np.float32) for _ in range(2))
    stream, output = upload(device, "fp32", start), device.allocate(dtype, 5, columns)
    x = upload(device, "fp32", parts)
    gammas = upload(device, "fp32", post), upload(device, "fp32", pre)
    device.launch(norm.add_norm(x, gammas[0], stream, gammas[1], output, epsilon=EPSILON))
    expected = start + rms_norm(parts.sum(0), post)
    np.testing.assert_allclose(host_view(stream), expected, rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == "fp32" else 8e-3
    np.testing.assert_allclose(host_view(output).astype(np.float32), rms_norm(expected, pre), tolerance, tolerance)
    device.launch(norm.add_norm(x, gammas[0], stream, epsilon=EPSILON))
    np.testing.assert_allclose(host_view(stream), expected + rms_norm(parts.sum(0), post), rtol=1e-5, atol=1e-5)


def test_only_the_wanted_rows_are_read(device: InterpreterDevice) -> None:
    random = np.random.default_rng(3)
    values = np.full((2 * 4, 48), np.nan, np.float32)
    values[[0, 2, 7]] = random.standard_normal((3, 48))
    gamma = random.uniform(0.5, 1.5, 48).astype(np.float32)
    output = device.allocate("fp32", 4, 48)
    positions = upload(device, "i32", np.array([[0, 2], [3, 3]]))
    arguments = upload(device, "fp32", values), positions, upload(device, "fp32", gamma), output
    device.launch(norm.gather_norm(*arguments, epsilon=EPSILON))
    np.testing.assert_allclose(host_view(output), rms_norm(values[[0, 2, 7, 7]], gamma), rtol=1e-5)


@pytest.mark.parametrize(("kind", "worst"), [("i8", 0.5), ("fp8e4nv", 16.0)])
def test_activations_in_eight_bits_have_a_scale_per_token(device: InterpreterDevice, kind: str, worst: float) -> None:
    """The largest error is half a step: of 127 for int8, of the top binade (448 ± 16) for fp8.

    The interpreter halves what it should round up to a power of two in fp8, a few values of a hundred.
    """
    random = np.random.default_rng(4)
    values = random.standard_normal((3, 96)).astype(np.float32) * np.array([[1e-3], [1], [1e3]], np.float32)
    values[1] = 0
    gamma = np.ones(96, np.float32)

    def target() -> Quantized:
        return Quantized(device.allocate(kind, 3, 96), device.allocate("fp32", 3))

    def check(output: Quantized, expected: Array) -> None:
        scale = host_view(output.scale)[:, None]
        error = np.abs(host_view(output.data).astype(np.float32) * scale - expected)
        assert (error <= 1.001 * worst * scale).mean() >= (1 if kind == "i8" else 0.97)

    output = target()
    device.launch(norm.norm(upload(device, "fp32", values), upload(device, "fp32", gamma), output, epsilon=EPSILON))
    check(output, rms_norm(values, gamma))
    device.launch(norm.quantize(upload(device, "fp32", values), output))
    check(output, values)
