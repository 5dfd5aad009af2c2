"""Products against float64 in every storage, split, gated, ragged in every dimension."""

from __future__ import annotations

import numpy as np
import pytest

from python_backends.errors import InternalError
from python_backends.runtime.gpu.device_weights import Matrix
from python_backends.runtime.gpu.interpreter import InterpreterDevice, host_view
from python_backends.runtime.gpu.kernels import linear, linear_config
from python_backends.runtime.gpu.kernels.linear_config import Config
from python_backends.runtime.gpu.kernels.norm import Quantized
from python_backends.runtime.gpu.launch import Tensor
from tests.python_backends.runtime.gpu.matrices import dequantized, random_matrix
from tests.python_backends.runtime.gpu.paged import Array, upload


def gated_gelu(both: Array) -> Array:
    gate, up = np.split(both, 2, -1)
    gelu: Array = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    return gelu


def check(actual: Tensor, expected: Array, tolerance: float) -> None:
    """Relative to the largest value."""
    found = host_view(actual).astype(np.float64)
    if found.ndim == 3:
        found = found.sum(0)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture
def device() -> InterpreterDevice:
    return InterpreterDevice()


@pytest.mark.parametrize(
    ("storage", "act", "tolerance"),
    [
        ("fp32", "fp32", 1e-6),
        ("bf16", "bf16", 1e-2),
        ("fp16", "fp16", 1e-3),
        ("i8", "bf16", 1e-2),
        ("fp8e4nv", "fp16", 1e-3),
        ("u8", "fp16", 1e-3),
        ("u8", "bf16", 1e-2),
        ("u8", "fp32", 1e-6),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_every_storage(device: InterpreterDevice, storage: str, act: str, tolerance: float, gated: bool) -> None:
    random = np.random.default_rng(5)
    weight = random_matrix(device, storage, 96, 320, random)
    values = random.standard_normal((3, 320))
    x = upload(device, act, values)
    output = device.allocate(act, 3, 48 if gated else 96)
    for launch in linear.product(weight, x, output, capability=90, gated=gated):
        device.launch(launch)
    expected = host_view(x).astype(np.float64) @ dequantized(weight).T
    check(output, gated_gelu(expected) if gated else expected, tolerance)


@pytest.mark.parametrize("kind", ["i8", "fp8e4nv"])
@pytest.mark.parametrize("gated", [False, True])
def test_eight_bit_weights_meet_eight_bit_activations(device: InterpreterDevice, kind: str, gated: bool) -> None:
    random = np.random.default_rng(6)
    weight = random_matrix(device, kind, 64, 128, random)
    as_row = random_matrix(device, kind, 5, 128, random)
    assert as_row.scale is not None
    output = device.allocate("fp32", 5, 32 if gated else 64)
    for launch in linear.product(weight, Quantized(as_row.data, as_row.scale), output, capability=90, gated=gated):
        device.launch(launch)
    expected = dequantized(as_row) @ dequantized(weight).T
    check(output, gated_gelu(expected) if gated else expected, 1e-5)


@pytest.mark.parametrize("storage", ["fp32", "u8"])
@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        ((70, 40, 256), Config(16, 32, 64, 1, 4, 2, group=2)),
        ((33, 48, 200), Config(32, 16, 128, 1, 4, 2, group=8)),
        ((1, 50, 384), Config(16, 16, 128, 2, 4, 2)),
        ((17, 16, 640), Config(16, 32, 64, 4, 4, 2)),
    ],
)
def test_tiles_that_do_not_divide(
    device: InterpreterDevice, storage: str, sizes: tuple[int, int, int], config: Config
) -> None:
    """A part of K may be empty; what lies behind the tokens is not a number."""
    tokens, rows, columns = sizes
    random = np.random.default_rng(7)
    weight = random_matrix(device, storage, rows, columns, random)
    values = np.full((tokens + 8, columns), np.nan)
    values[:tokens] = random.standard_normal((tokens, columns))
    x = upload(device, "fp32", values).view(0, tokens, columns)
    shape = (tokens, rows) if config.split == 1 else (config.split, tokens, rows)
    output = device.allocate("fp32", *shape)
    for launch in linear.product(weight, x, output, capability=90, config=config):
        device.launch(launch)
    check(output, values[:tokens].astype(np.float32).astype(np.float64) @ dequantized(weight).T, 1e-6)


def test_a_row_does_not_depend_on_the_others(device: InterpreterDevice) -> None:
    random = np.random.default_rng(8)
    weight = random_matrix(device, "bf16", 32, 64, random)
    values = random.standard_normal((4, 64))
    outputs = []
    for others in (1.0, np.nan):
        values[1:] *= others
        output = device.allocate("fp32", 4, 32)
        for launch in linear.product(weight, upload(device, "bf16", values), output, capability=90):
            device.launch(launch)
        outputs.append(host_view(output)[0].copy())
    np.testing.assert_array_equal(*outputs)


def test_what_does_not_fit_is_refused(device: InterpreterDevice) -> None:
    weight = random_matrix(device, "fp32", 32, 64, np.random.default_rng(0))
    x = device.allocate("fp32", 2, 64)
    for output, gated in ((device.allocate("fp32", 2, 31), False), (device.allocate("fp32", 2, 2, 16), True)):
        with pytest.raises(InternalError):
            linear.product(weight, x, output, capability=90, gated=gated)


@pytest.mark.parametrize("storage", ["bf16", "fp8e4nv", "u8"])
@pytest.mark.parametrize("tokens", [1, 16, 64, 512])
def test_candidates_fit_shared_memory_and_start_with_the_choice(storage: str, tokens: int) -> None:
    scale = None if storage == "bf16" else Tensor(0, "fp32", (1,))
    weight = Matrix(Tensor(0, storage, (5376, 21504 // (2 if storage == "u8" else 1))), scale, 21504)
    x = Tensor(0, "bf16", (tokens, 21504))
    for capability in (89, 90):
        found = linear_config.candidates(weight, x, capability)
        assert found[0] == linear_config.choose(weight, x, capability)
        assert len(found) > 5
    assert linear_config.split_parts(weight, tokens, 90) == (4 if tokens <= linear_config.SKINNY_TOKENS else 1)
