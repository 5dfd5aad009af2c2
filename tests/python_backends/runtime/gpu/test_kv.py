"""Paged KV: blocks, tails and whole slots leave and return bit for bit, whatever pages and slots they lie in."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.checkpoint import open_checkpoint
from builders.model_config import read_model_config
from builders.random_checkpoint import shape_config
from python_backends.errors import ConfigError, InternalError
from python_backends.runtime.gpu.interpreter import InterpreterDevice, host_view
from python_backends.runtime.gpu.kv import PagedKv, plan_kv
from python_backends.runtime.gpu.pages import PAGE_TOKENS
from tests.checkpoints import tiny
from tests.driver import model_shape

CONTEXT, SLOTS = 4 * PAGE_TOKENS, 3


@pytest.fixture(scope="module")
def model():
    return model_shape(open_checkpoint(tiny("4b")).config)


def paged(model, block_tokens=PAGE_TOKENS):
    device = InterpreterDevice()
    return PagedKv(device, model, plan_kv(model, SLOTS, CONTEXT, 2**40, "fp32"), "fp32", block_tokens)


def fill(kv: PagedKv, slot: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Write random tokens where a step would, and return them: by group [tokens, layers, 2, heads, head_dim]."""
    rng = np.random.default_rng(seed)
    kv.reserve([(slot, length)])
    written = {}
    for group, pool, table in (
        ("global", kv.global_pool, kv.pages.table[slot]),
        ("local", kv.local_pool, kv.ring[slot]),
    ):
        memory = host_view(pool)
        _, layers, two, heads, _, size = pool.shape
        values = rng.random((length, layers, two, heads, size), np.float32)
        for position in range(length):
            page = table[position // PAGE_TOKENS % len(table)]
            memory[page, :, :, :, position % PAGE_TOKENS] = values[position]
        written[group] = values
    return written


def found(kv: PagedKv, slot: int, group: str, position: int) -> np.ndarray:
    pool, table = (kv.global_pool, kv.pages.table) if group == "global" else (kv.local_pool, kv.ring)
    page = table[slot, position // PAGE_TOKENS % table.shape[1]]
    return host_view(pool)[page, :, :, :, position % PAGE_TOKENS]


def check(kv: PagedKv, slot: int, length: int, written: dict[str, np.ndarray]) -> None:
    for position in range(length):
        np.testing.assert_array_equal(found(kv, slot, "global", position), written["global"][position])
    for position in range(max(0, length - kv.layout.window), length):
        np.testing.assert_array_equal(found(kv, slot, "local", position), written["local"][position])


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, CONTEXT), other=st.integers(0, SLOTS - 1), blocks=st.sampled_from([64, 128]))
def test_blocks_and_a_tail_put_a_sequence_into_any_slot(model, length, other, blocks):
    kv = paged(model, blocks)
    fill(kv, 1, 100, seed=1)
    written = fill(kv, 0, length, seed=2)
    layout = kv.layout
    payloads = [np.empty(layout.block_bytes, np.uint8) for _ in range(length // blocks)]
    for index, payload in enumerate(payloads):
        kv.export_block(0, index * blocks, memoryview(payload))
    tail = np.empty(layout.tail_bytes(length), np.uint8)
    kv.export_tail(0, length, memoryview(tail))
    kv.release(0)
    kv.release(other)
    fill(kv, 2 if other != 2 else 1, 90, seed=3)  # takes the pages that came free
    kv.import_blocks(other, [memoryview(payload) for payload in payloads], memoryview(tail), length)
    check(kv, other, length, written)
    kv.pages.check_integrity()


@settings(max_examples=20, deadline=None)
@given(length=st.integers(0, CONTEXT), other=st.integers(0, SLOTS - 1))
def test_a_slot_set_aside_returns_into_any_slot_many_times(model, length, other):
    kv = paged(model)
    written = fill(kv, 0, length, seed=2)
    state = kv.export_slot(0, length)
    assert state.length == length
    kv.release(0)
    for slot in (other, (other + 1) % SLOTS):
        kv.import_slot(slot, state)
        check(kv, slot, length, written)


def test_a_page_is_one_copy(model):
    kv = paged(model)
    kv.reserve([(0, 200)])
    (piece,) = kv.block(0, 64)
    assert (piece.height, piece.width) == (1, kv.layout.block_bytes)


def test_wrong_buffers_blocks_and_slots_are_refused(model):
    kv = paged(model)
    kv.reserve([(0, 200)])
    with pytest.raises(InternalError, match="bytes"):
        kv.export_block(0, 0, memoryview(bytearray(3)))
    with pytest.raises(InternalError, match="does not start"):
        kv.block(0, 3)
    with pytest.raises(InternalError, match="slots"):
        kv.block(SLOTS, 0)
    with pytest.raises(InternalError, match="another runtime"):
        kv.import_slot(0, object())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="multiple of 64"):
        paged(model, 96)


@given(limit=st.integers(0, 10**9), slots=st.integers(1, 64), context=st.integers(1, 131_072))
def test_what_is_planned_fits_or_is_refused_by_name(model, limit, slots, context):
    smallest = plan_kv(model, 1, min(context, 512), 2**40, "bf16").num_bytes
    if limit < smallest:
        with pytest.raises(ConfigError, match="gpu_memory_gb"):
            plan_kv(model, slots, context, limit, "bf16")
    else:
        sizes = plan_kv(model, slots, context, limit, "bf16")
        assert sizes.num_bytes <= limit
        assert sizes.num_slots <= slots


@pytest.mark.parametrize(("dtype", "gigabytes"), [("bf16", 11.5), ("fp8e4nv", 5.8)])
def test_one_128k_sequence_of_the_27b_shape_fits(tmp_path, dtype, gigabytes):
    (tmp_path / "config.json").write_text(json.dumps(shape_config("27b")))
    model = model_shape(read_model_config(tmp_path))
    sizes = plan_kv(model, 1, 131_072, int(gigabytes * 1e9), dtype)
    assert (sizes.num_slots, sizes.context_length) == (1, 131_072)
