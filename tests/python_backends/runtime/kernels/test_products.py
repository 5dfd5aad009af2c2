"""Every kernel of a quantized product against float64, over random shapes and hard values."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.python_backends.runtime.kernels.products import Weight, multiply, product_session, rounding_bound

REPOSITORY = Path(__file__).parents[4]


def check(x, weight, session, bias=0.0):
    exact = x.astype(np.float64) @ weight.dense().T + bias
    error = np.abs(multiply(session, x) - exact)
    assert (error <= rounding_bound(x, weight, len(x)) + np.abs(bias) * 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 20), st.integers(21, 200)),
    columns=st.integers(1, 150),
    inner=st.integers(1, 700),
    bits=st.sampled_from((4, 8)),
    block=st.sampled_from((32, 64, 128, 256)),
    asymmetric=st.booleans(),
    with_bias=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_of_any_shape_are_exact_but_for_rounding(
    compiled, rows, columns, inner, bits, block, asymmetric, with_bias, threads, seed
):
    rng = np.random.default_rng(seed)
    weight = Weight.random(rng, columns, inner, bits, block, asymmetric=asymmetric)
    bias = rng.normal(size=columns).astype(np.float32) if with_bias else None
    session = product_session(weight, compiled, bias=bias, threads=threads)
    x = rng.normal(size=(rows, inner)).astype(np.float32)
    check(x, weight, session, 0.0 if bias is None else bias.astype(np.float64))


@pytest.mark.parametrize("rows", [3, 12, 100])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-20, 1e30])
def test_zero_denormal_and_huge_activations(compiled, rows, size):
    rng = np.random.default_rng(0)
    weight = Weight.random(rng, 70, 300)
    x = (rng.normal(size=(rows, 300)) * size).astype(np.float32)
    check(x, weight, product_session(weight, compiled))


@pytest.mark.parametrize("rows", [3, 12, 100])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e4, 1e20])
def test_scales_of_any_size(compiled, rows, scale):
    rng = np.random.default_rng(1)
    weight = Weight.random(rng, 40, 160, scale=scale)
    weight.quantized.scales[:, 1] = 0
    weight.quantized.scales[3] = 0
    check(rng.normal(size=(rows, 160)).astype(np.float32), weight, product_session(weight, compiled))


@pytest.mark.parametrize("rows", [3, 12, 100])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_row_is_not_a_number_and_leaves_the_others_alone(compiled, rows, value):
    rng = np.random.default_rng(2)
    weight = Weight.random(rng, 64, 96)
    session = product_session(weight, compiled)
    x = rng.normal(size=(rows, 96)).astype(np.float32)
    clean = multiply(session, x)
    x[1, 40] = value
    product = multiply(session, x)
    assert not np.isfinite(product[1]).any()
    rest = np.arange(rows) != 1
    np.testing.assert_array_equal(product[rest], clean[rest])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_row_is_the_same_bit_for_bit_whatever_shares_its_call(compiled, bits, block, asymmetric):
    rng = np.random.default_rng(3)
    weight = Weight.random(rng, 200, 448, bits, block, asymmetric=asymmetric)
    session = product_session(weight, compiled)
    x = rng.normal(size=(80, 448)).astype(np.float32)
    alone = np.concatenate([multiply(session, row[None]) for row in x])
    for rows in (2, 5, 8, 9, 16, 17, 31, 64, 80):
        np.testing.assert_array_equal(multiply(session, x[:rows]), alone[:rows])
        np.testing.assert_array_equal(multiply(session, x[80 - rows :]), alone[80 - rows :])


def test_rows_of_a_long_prompt_do_not_depend_on_those_behind_them(compiled):
    rng = np.random.default_rng(4)
    weight = Weight.random(rng, 96, 6912)
    session = product_session(weight, compiled)
    x = rng.normal(size=(1100, 6912)).astype(np.float32)
    whole = multiply(session, x)
    np.testing.assert_allclose(multiply(session, x[:90]), whole[:90], rtol=1e-5, atol=1e-4)
    check(x[1000:], weight, session)
    assert np.abs(whole - x @ weight.dense().T.astype(np.float32)).max() < 0.02 * np.abs(whole).max()


def test_without_amx_any_number_of_rows_takes_the_vector_kernel(compiled, tmp_path):
    rng = np.random.default_rng(6)
    x = rng.normal(size=(100, 160)).astype(np.float32)
    weight = Weight.random(rng, 70, 160)
    np.savez(tmp_path / "inputs.npz", x=x, data=weight.quantized.data, scales=weight.quantized.scales)
    script = f"""
import numpy as np
from builders.quantize import Quantized
from tests.python_backends.runtime.kernels.products import Weight, multiply, product_session
values = np.load({str(tmp_path / "inputs.npz")!r})
weight = Weight(70, 160, 4, 32, Quantized(values["data"], values["scales"], None))
np.save({str(tmp_path / "product.npy")!r}, multiply(product_session(weight, {str(compiled)!r}), values["x"]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "WICORE_NO_AMX": "1"}, cwd=REPOSITORY)
    session = product_session(weight, compiled)
    alone = np.concatenate([multiply(session, row[None]) for row in x])
    np.testing.assert_array_equal(np.load(tmp_path / "product.npy"), alone)


def test_no_rows_and_more_dimensions(compiled):
    rng = np.random.default_rng(5)
    weight = Weight.random(rng, 33, 64)
    session = product_session(weight, compiled)
    assert multiply(session, np.zeros((0, 64), np.float32)).shape == (0, 33)
