"""Attention of chunks against float64: ragged rows, pasts in pages and rings, windows, images across tiles' edges."""

from __future__ import annotations

import numpy as np
import pytest

from python_backends.runtime.gpu.kernels import prefill_attention as prefill
from python_backends.runtime.gpu.kernels.prefill_attention import PrefillConfig
from tests.gpu.device import kernel_device
from tests.python_backends.runtime.gpu.paged import Array, Case, upload


def check(case: Case, config: PrefillConfig | None, tolerance: float = 5e-6, groups: Array | None = None) -> None:
    case.fill(with_chunk=False)
    output = case.device.allocate(case.dtype, case.rows.tokens, case.heads * case.head_dim)
    image_group = None if groups is None else upload(case.device, "i32", groups)
    case.device.launch(
        prefill.prefill_attention(
            *(case.packed_query(), case.packed_fresh(), case.kv, case.rows, output),
            capability=90,
            image_group=image_group,
            config=config,
        )
    )
    case.check(output, tolerance, groups)


@pytest.mark.parametrize(
    ("past_len", "query_len", "positions", "sizes", "window", "blocks"),
    [
        ([0, 70, 128], [96, 33, 0], 96, (2, 1, 16), 0, (32, 32)),
        ([0, 130], [80, 50], 96, (2, 2, 64), 0, (64, 64)),
        ([300, 63], [40, 64], 64, (4, 1, 16), 0, (32, 128)),
        ([0, 500], [200, 190], 200, (2, 1, 16), 128, (64, 32)),
        ([700, 64, 129], [150, 150, 1], 160, (2, 1, 16), 64, (32, 64)),
        ([201, 1000], [70, 128], 128, (1, 1, 128), 64, (64, 128)),
        ([33], [20], 32, (2, 1, 32), 48, (16, 16)),
    ],
)
def test_every_valid_position_attends_to_what_it_sees(
    past_len: list[int],
    query_len: list[int],
    positions: int,
    sizes: tuple[int, int, int],
    window: int,
    blocks: tuple[int, int],
) -> None:
    case = Case(kernel_device(), past_len, query_len, positions, *sizes, window)
    check(case, PrefillConfig(*blocks, 4, 2))


@pytest.mark.parametrize("window", [0, 64])
def test_an_images_tokens_see_each_other_both_ways(window: int) -> None:
    """Images that begin and end inside tiles, one longer than the window, one at the end of a ragged row."""
    case = Case(kernel_device(), [0, 90, 10], [190, 120, 40], 192, 2, 1, 16, window)
    groups = np.full((3, 192), -1, np.int32)
    for row, number, start, stop in ((0, 0, 20, 51), (0, 1, 52, 60), (0, 2, 70, 165), (1, 0, 0, 33), (1, 1, 80, 120)):
        groups[row, start:stop] = number
    check(case, PrefillConfig(32, 32, 4, 2), groups=groups)


@pytest.mark.parametrize("kv_dtype", ["fp16", "fp8e4nv"])
def test_narrow_types(kv_dtype: str) -> None:
    case = Case(kernel_device(), [130, 20], [64, 10], 64, 4, 2, 32, 0, "fp16", kv_dtype)
    check(case, None, 3e-3)


def test_text_in_a_chunk_with_images_is_causal() -> None:
    case = Case(kernel_device(), [20], [60], 64, 2, 1, 16)
    check(case, PrefillConfig(32, 32, 4, 2), groups=np.full((1, 64), -1, np.int32))
