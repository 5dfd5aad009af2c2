"""Slots are clipped to memory in the documented order, and buffers cost nothing until touched."""

from __future__ import annotations

import dataclasses
import mmap

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.errors import ConfigError
from python_backends.manifest import ModelShape
from python_backends.runtime.memory import lazy_zeros, plan_slots

GEMMA_27B = ModelShape(
    vocab_size=262208,
    hidden_size=5376,
    num_layers=62,
    num_heads=32,
    num_kv_heads=16,
    head_dim=128,
    sliding_window=1024,
    layer_types=tuple("global" if index % 6 == 5 else "local" for index in range(62)),
    max_context_length=131072,
    eos_token_ids=(1, 106),
    bos_token_id=2,
    pad_token_id=0,
    image=None,
)
ROW = 2 * 16 * 128 * 2  # key and value of one token in one layer, float16
WINDOWS, GLOBAL = 52 * 1279 * ROW, 10 * ROW


def test_everything_asked_for_where_it_fits():
    plan = plan_slots(GEMMA_27B, 16, 8192, 10**12, 2)
    assert (plan.num_slots, plan.context_length, plan.window_capacity) == (16, 8192, 1279)
    assert plan.num_bytes == 16 * (WINDOWS + 8192 * GLOBAL)


@pytest.mark.parametrize(
    ("slots_worth", "wanted", "found"),
    [
        (7.5 * (WINDOWS + 131072 * GLOBAL), (16, 131072), (7, 131072)),  # slots go first
        (4 * (WINDOWS + 100_000 * GLOBAL), (16, 131072), (4, 100_000)),  # down to four, then the context
        (2 * (WINDOWS + 8192 * GLOBAL), (16, 131072), (2, 8192)),  # then the other slots
        (WINDOWS + 1000 * GLOBAL, (16, 131072), (1, 1000)),  # then the rest of the context
        (3 * (WINDOWS + 4000 * GLOBAL), (3, 4000), (3, 4000)),  # less than the usual was asked for
    ],
)
def test_what_is_given_up_first(slots_worth, wanted, found):
    plan = plan_slots(GEMMA_27B, *wanted, int(slots_worth), 2)
    assert (plan.num_slots, plan.context_length) == found


@given(
    slots=st.integers(1, 64),
    context=st.integers(1, 200_000),
    limit=st.integers(0, 2**40),
    item_size=st.sampled_from([2, 4]),
    text_layers=st.integers(1, 62),
)
def test_a_plan_never_exceeds_the_limit_or_what_was_asked_for(slots, context, limit, item_size, text_layers):
    shape = dataclasses.replace(GEMMA_27B, num_layers=text_layers, layer_types=GEMMA_27B.layer_types[:text_layers])
    try:
        plan = plan_slots(shape, slots, context, limit, item_size)
    except ConfigError:
        # One slot of a short context must really not fit.
        assert plan_slots(shape, 1, min(512, context), 2**50, item_size).num_bytes > limit
        return
    assert 1 <= plan.num_slots <= slots
    assert min(context, 512) <= plan.context_length <= min(context, 131072)
    assert plan.num_bytes <= limit


def test_buffers_are_zero_page_aligned_and_resident_only_where_touched():
    process = psutil.Process()
    before = process.memory_info().rss
    buffer = lazy_zeros((4, 2, 2**20, 32), np.float32)
    assert buffer.nbytes == 2**30
    assert buffer.ctypes.data % mmap.PAGESIZE == 0
    buffer[2, 1, :100] = 1
    assert buffer[2, 1, 100:200].sum() == 0
    assert process.memory_info().rss - before < 2**24
