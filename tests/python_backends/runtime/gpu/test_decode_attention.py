"""Decode attention over shuffled pages against float64: ragged, idle, windows in rings, drafts, 8-bit KV, masses."""

from __future__ import annotations

import numpy as np
import pytest

from python_backends.runtime.gpu.interpreter import InterpreterDevice
from python_backends.runtime.gpu.kernels import decode_attention as decode
from python_backends.runtime.gpu.kernels import decode_splits
from python_backends.runtime.gpu.kernels.attention_mass import Mass
from python_backends.runtime.gpu.kernels.decode_splits import DecodeConfig, Scratch
from python_backends.runtime.gpu.launch import Launch, Tensor
from tests.gpu.device import kernel_device
from tests.python_backends.runtime.gpu.paged import PAGE, Case


def scratch_for(case: Case) -> Scratch:
    tiles = decode_splits.mass_tiles(case.kv)
    return Scratch.allocate(case.device, case.rows.tokens, case.heads, case.head_dim, case.rows.batch, tiles)


def run(case: Case, config: DecodeConfig | None = None, mass: Mass | None = None) -> Tensor:
    case.fill(with_chunk=True)
    output = case.device.allocate(case.dtype, case.rows.tokens, case.heads * case.head_dim)
    launches = decode.decode_attention(
        case.packed_query(), case.kv, case.rows, output, scratch_for(case), capability=90, config=config, mass=mass
    )
    launch_all(case.device, launches)
    return output


def launch_all(device: InterpreterDevice, launches: list[Launch]) -> None:
    for launch in launches:
        device.launch(launch)


@pytest.mark.parametrize(
    ("past_len", "query_len", "positions", "sizes", "window", "block", "splits"),
    [
        ([0, 63, 9, 64, 200], [1, 1, 0, 1, 1], 1, (4, 2, 32), 0, 64, 1),
        ([0, 63, 9, 64, 400], [1, 1, 0, 1, 1], 1, (2, 2, 16), 0, 32, 4),
        ([700, 130], [1, 1], 1, (4, 1, 16), 128, 64, 1),
        ([1000, 127, 3], [1, 1, 0], 1, (2, 1, 16), 128, 32, 3),
        ([60, 300, 9, 0], [5, 3, 0, 1], 5, (4, 2, 32), 0, 64, 3),
        ([190, 515, 0], [5, 2, 5], 5, (4, 1, 16), 64, 32, 2),
        ([300, 40], [8, 2], 8, (4, 1, 128), 0, 128, 2),
        ([1021], [8], 8, (2, 2, 64), 192, 128, 1),
    ],
)
def test_every_valid_position_attends_to_what_it_sees(
    past_len: list[int],
    query_len: list[int],
    positions: int,
    sizes: tuple[int, int, int],
    window: int,
    block: int,
    splits: int,
) -> None:
    case = Case(kernel_device(), past_len, query_len, positions, *sizes, window)
    case.check(run(case, DecodeConfig(block, splits, 1, 4, 2)), 2e-6)


@pytest.mark.parametrize("kv_dtype", ["fp16", "fp8e4nv"])
def test_narrow_kv(kv_dtype: str) -> None:
    case = Case(kernel_device(), [200, 17], [1, 1], 1, 4, 2, 64, 0, "fp16", kv_dtype)
    case.check(run(case), 3e-3)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Bit for bit, in the same bucket."""
    config = DecodeConfig(64, 3, 1, 4, 2)
    outputs = []
    for others in (0, 450):
        case = Case(kernel_device(), [300, others], [2, 1 if others else 0], 2, 2, 1, 16, seed=5)
        first = np.random.default_rng(1)
        case.keys[0, :302] = first.standard_normal(case.keys[0, :302].shape)
        case.values[0, :302] = first.standard_normal(case.values[0, :302].shape)
        case.query[0] = first.standard_normal(case.query[0].shape)
        outputs.append(case.device.read(run(case, config))[:2])
    assert np.array_equal(*outputs)


@pytest.mark.parametrize(
    ("past_len", "query_len", "positions", "block", "splits", "block_tokens"),
    [
        ([0, 330, 70, 5], [1, 1, 1, 0], 1, 32, 3, PAGE),
        ([130, 63], [4, 2], 5, 64, 1, PAGE),
        ([700, 63], [1, 1], 1, 64, 2, 3 * PAGE),
    ],
)
def test_masses_are_the_last_querys_shares_of_the_blocks(
    past_len: list[int], query_len: list[int], positions: int, block: int, splits: int, block_tokens: int
) -> None:
    case = Case(kernel_device(), past_len, query_len, positions, 4, 2, 16)
    blocks = max(past + query for past, query in zip(past_len, query_len, strict=True)) // block_tokens + 2
    mass = Mass(case.device.allocate("fp32", len(past_len), blocks), block_tokens)
    config = DecodeConfig(block, splits, 1, 4, 2)
    case.check(run(case, config, mass), 2e-6)
    check_masses(case, mass, blocks)


def check_masses(case: Case, mass: Mass, blocks: int) -> None:
    found = case.device.read(mass.output)
    for row, query in enumerate(case.query_len):
        wanted = case.masses(row, mass.block_tokens, blocks) if query else np.zeros(blocks)
        assert found[row] == pytest.approx(wanted, abs=1e-6)
        assert found[row].sum() == pytest.approx(1.0 if query else 0.0, abs=1e-5)


def test_the_masses_of_a_chunk_are_those_of_its_last_query() -> None:
    case = Case(kernel_device(), [100, 0, 30], [140, 33, 0], 256, 4, 2, 16)
    case.fill(with_chunk=True)
    mass = Mass(case.device.allocate("fp32", 3, 5), PAGE)
    config = DecodeConfig(32, 3, 1, 4, 2)
    launches = decode.last_query_mass(
        case.packed_query(), case.kv, case.rows, scratch_for(case), mass, capability=90, config=config
    )
    launch_all(case.device, launches)
    check_masses(case, mass, 5)


@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("batch", [1, 16])
def test_candidates_stay_within_the_scratch_buffers(capability: int, batch: int) -> None:
    case = Case(kernel_device(), [200] * batch, [1] * batch, 1, 4, 2, 16)
    found = decode_splits.candidates(case.heads, case.kv, case.rows, capability)
    assert found[0] == decode_splits.default_config(case.heads, case.kv, case.rows, capability)
    lines = decode_splits.scratch_lines(case.rows.tokens, case.heads)
    assert all(1 <= config.splits * case.rows.tokens * case.heads <= lines for config in found)
    assert len(set(found)) == len(found)
