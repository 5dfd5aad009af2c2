"""Head norms, rotation and appending against PyTorch, with padding, split products, rings and long contexts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from python_backends.runtime.gpu.interpreter import host_view
from python_backends.runtime.gpu.kernels import rope
from python_backends.runtime.gpu.launch import DTYPES, Tensor
from tests.gpu.device import kernel_device
from tests.python_backends.runtime.gpu.paged import PAGE, Array, Case, upload

EPSILON = 1e-6


def expected(case: Case, qkv: Array, query_gamma: Array, key_gamma: Array, frequency: Array) -> tuple[Array, Array]:
    """(query [B, S, H, hd], keys and values [B, S, 2·KV, hd]) as Hugging Face computes them, in float32."""
    heads, kv_heads = case.heads, case.kv_heads
    x = torch.from_numpy(qkv.astype(np.float32)).reshape(-1, case.positions, heads + 2 * kv_heads, case.head_dim)
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON)
    gamma = torch.stack([torch.from_numpy(query_gamma)] * heads + [torch.from_numpy(key_gamma)] * kv_heads)
    normed = normed[:, :, : heads + kv_heads] * gamma
    positions = torch.tensor(case.past_len)[:, None] + torch.arange(case.positions)
    angles = positions[..., None].float() * torch.from_numpy(frequency)
    angles = torch.cat([angles, angles], -1)[:, :, None]
    first, second = normed.chunk(2, -1)
    rotated = normed * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
    joined = torch.cat([rotated, x[:, :, heads + kv_heads :]], 2).numpy()
    return joined[:, :, :heads], joined[:, :, heads:]


@pytest.mark.parametrize(
    ("past_len", "query_len", "positions", "window", "dtype", "kv_dtype", "split", "sizes"),
    [
        ([0, 63, 5, 130], [1, 1, 0, 1], 1, 0, "fp32", "fp32", 1, (4, 2, 32)),
        ([0, 126, 40], [3, 2, 0], 3, 64, "fp16", "fp16", 1, (2, 2, 16)),
        ([100_000, 131_060], [1, 2], 2, 64, "fp32", "fp32", 3, (4, 1, 64)),
        ([300], [1], 1, 0, "fp16", "fp8e4nv", 2, (2, 1, 128)),
    ],
)
def test_heads_are_normed_rotated_and_appended(
    past_len: list[int],
    query_len: list[int],
    positions: int,
    window: int,
    dtype: str,
    kv_dtype: str,
    split: int,
    sizes: tuple[int, int, int],
) -> None:
    device = kernel_device()
    case = Case(device, past_len, query_len, positions, *sizes, window, dtype, kv_dtype)
    total = (case.heads + 2 * case.kv_heads) * case.head_dim
    parts = case.random.standard_normal((split, case.rows.tokens, total)).astype(np.float32)
    if split == 1:
        parts = parts.astype(DTYPES[dtype]).astype(np.float32)
    gammas = [case.random.uniform(0.2, 1.5, case.head_dim).astype(np.float32) for _ in range(2)]
    frequency = (10_000.0 ** -(np.arange(case.head_dim // 2) / (case.head_dim // 2))).astype(np.float32)
    wanted_query, wanted_fresh = expected(case, parts.sum(0), *gammas, frequency)
    valid = np.arange(positions) < np.array(query_len)[:, None]
    parts[:, ~valid.reshape(-1)] = np.nan
    qkv = upload(device, "fp32", parts) if split > 1 else upload(device, dtype, parts[0])
    query = device.allocate(dtype, case.rows.tokens, case.heads, case.head_dim)
    fresh = device.allocate(dtype, case.rows.tokens, 2 * case.kv_heads, case.head_dim)
    vectors = [upload(device, "fp32", vector) for vector in (*gammas, frequency)]
    for heads_per_program in (None, 4):
        device.launch(
            rope.rope_append(
                *(qkv, *vectors, case.rows, case.kv, query, fresh),
                epsilon=EPSILON,
                append=True,
                heads_per_program=heads_per_program,
            )
        )
        tolerance = 2e-6 if dtype == "fp32" else 2e-3
        for tensor, wanted in ((query, wanted_query), (fresh, wanted_fresh)):
            found = device.read(tensor).astype(np.float32).reshape(wanted.shape)
            assert found[valid] == pytest.approx(wanted[valid], abs=tolerance, rel=tolerance)
            assert not found[~valid].any()
        check_pages(case, fresh)


def check_pages(case: Case, fresh: Tensor, kept: int | None = None) -> None:
    """The pages hold the last ``kept`` valid tokens, rounded from ``fresh``, and nothing else was written."""
    pool = host_view(case.pool)
    values = host_view(fresh).reshape(len(case.past_len), case.positions, 2, case.kv_heads, case.head_dim)
    written = np.zeros(pool.shape[:1] + pool.shape[4:5], bool)
    for row, (past, count) in enumerate(zip(case.past_len, case.query_len, strict=True)):
        for offset in range(max(0, count - (kept or count)), count):
            page, inside = case.place(row, past + offset)
            assert not written[page, inside]
            written[page, inside] = True
            wanted = values[row, offset].astype(np.float32)
            found = pool[page, 1, :, :, inside].astype(np.float32)
            if case.kv_dtype == "fp8e4nv":
                wanted = torch.from_numpy(wanted).to(torch.float8_e4m3fn).float().numpy()
                # The interpreter does not round to nearest (and loses the carry into a power of two); a GPU does.
                carried = np.frexp(np.abs(wanted))[0] == 0.5
                assert found[~carried] == pytest.approx(wanted[~carried], rel=2**-3, abs=2**-9)
            else:
                assert np.array_equal(found, wanted)
    untouched = pool.view(np.uint8)
    assert (untouched[:, [0, 2]] == 0xFF).all()
    assert (np.moveaxis(untouched[:, 1], 3, 1)[~written] == 0xFF).all()


@pytest.mark.parametrize("window", [0, 128])
def test_a_chunk_longer_than_the_ring_leaves_its_end(window: int) -> None:
    device = kernel_device()
    case = Case(device, [70, 0, 11], [700, 0, 40], 704, 2, 2, 16, window)
    fresh = case.packed_fresh()
    device.launch(rope.append(fresh, case.rows, case.kv))
    check_pages(case, fresh, case.width * PAGE if window else None)


def test_angles_of_any_context_are_reduced_exactly() -> None:
    """Positions up to 131,071 with frequency 1, where the float32 angle is the position itself."""
    device = kernel_device()
    case = Case(device, [131_071 - 2 * step * 997 for step in range(16)], [1] * 16, 1, 1, 1, 16, 64)
    heads = np.zeros((16, 3, 16), np.float32)
    heads[..., :8] = 1.0
    ones, frequency = np.ones(16, np.float32), np.full(8, 1.0, np.float32)
    query = device.allocate("fp32", 16, 1, 16)
    fresh = device.allocate("fp32", 16, 2, 16)
    tensors = [upload(device, "fp32", values) for values in (heads.reshape(16, -1), ones, ones, frequency)]
    device.launch(
        rope.rope_append(*tensors, case.rows, case.kv, query, fresh, epsilon=1e-12, append=False, heads_per_program=4)
    )
    found = device.read(query)[:, 0, [0, 8]] / np.sqrt(2.0)
    exact = np.array(case.past_len, np.float64)
    assert found == pytest.approx(np.stack([np.cos(exact), np.sin(exact)], 1), abs=3e-7)
