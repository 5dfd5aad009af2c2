"""KV that leaves and enters beside the steps: whatever is appended meanwhile, each copy holds what was there when it
began, and each step sees what was loaded before it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.checkpoint import open_checkpoint
from python_backends.runtime.gpu.interpreter import host_view
from python_backends.runtime.gpu.kv import PagedKv, plan_kv
from python_backends.runtime.gpu.pages import PAGE_TOKENS
from tests.checkpoints import tiny
from tests.driver import model_shape
from tests.python_backends.runtime.gpu.late import LateDevice

SLOTS, CONTEXT = 2, 6 * PAGE_TOKENS


class Slots:
    """Paged KV on such a device, and what every slot ought to hold, by position."""

    def __init__(self, model):
        self.kv = PagedKv(LateDevice(), model, plan_kv(model, SLOTS, CONTEXT, 2**40, "fp32"), "fp32", PAGE_TOKENS)
        self.random = np.random.default_rng(0)
        self.tokens = [[] for _ in range(SLOTS)]
        self.leaving = []
        """(transfer, payload, what it must hold in the end)"""
        self.saved = []
        """(blocks, tail, tokens)"""

    def append(self, slot, count, anew):
        """What a step does."""
        tokens = [] if anew else self.tokens[slot]
        count = min(count, CONTEXT - len(tokens))
        if not count:
            return
        self.kv.begin_step(slot, len(tokens), len(tokens) + count)
        if not tokens:
            self.kv.release(slot)
        self.kv.reserve([(slot, len(tokens) + count)])
        tokens = [*tokens, *({} for _ in range(count))]
        for position in range(len(tokens) - count, len(tokens)):
            for group, pool, table in self.groups(slot):
                memory = host_view(pool)[table[position // PAGE_TOKENS % len(table)], :, :, :, position % PAGE_TOKENS]
                memory[...] = tokens[position][group] = self.random.random(memory.shape, np.float32)
        self.tokens[slot] = tokens

    def groups(self, slot):
        return (
            ("global", self.kv.global_pool, self.kv.pages.table[slot]),
            ("local", self.kv.local_pool, self.kv.ring[slot]),
        )

    def block(self, slot, which):
        """Begin to copy a block out."""
        full = len(self.tokens[slot]) // PAGE_TOKENS
        if full:
            start = which % full * PAGE_TOKENS
            payload = np.empty(self.kv.layout.block_bytes, np.uint8)
            transfer = self.kv.export_block(slot, start, payload.data)
            wanted = packed(self.tokens[slot], "global", start, start + PAGE_TOKENS)
            self.leaving.append((transfer, payload, wanted))

    def tail(self, slot):
        """Begin to copy a tail out."""
        tokens = self.tokens[slot]
        length = len(tokens)
        payload = np.empty(self.kv.layout.tail_bytes(length), np.uint8)
        transfer = self.kv.export_tail(slot, length, payload.data)
        wanted = packed(tokens, "global", length - length % PAGE_TOKENS, length)
        wanted += packed(tokens, "local", max(0, length - self.kv.layout.window), length)
        self.leaving.append((transfer, payload, wanted))

    def save(self, slot):
        """Everything of a slot, waited for."""
        first = len(self.leaving)
        for index in range(len(self.tokens[slot]) // PAGE_TOKENS):
            self.block(slot, index)
        self.tail(slot)
        parts = self.leaving[first:]
        for transfer, _, _ in parts:
            transfer.wait()
        *blocks, tail = (payload for _, payload, _ in parts)
        self.saved.append((blocks, tail, list(self.tokens[slot])))

    def load(self, slot, which):
        """Begin to fill a slot with what was saved."""
        if self.saved:
            blocks, tail, tokens = self.saved[which % len(self.saved)]
            self.kv.import_blocks(slot, [block.data for block in blocks], tail.data, len(tokens))
            self.tokens[slot] = tokens

    def wait(self, which):
        """Something is over of itself."""
        if self.leaving:
            self.leaving[which % len(self.leaving)][0].wait()

    def check(self, seed):
        """In any order, everything that left is what it was."""
        random.Random(seed).shuffle(self.leaving)
        for transfer, payload, wanted in self.leaving:
            transfer.wait()
            assert payload.tobytes() == wanted
        self.kv.pages.check_integrity()


def packed(tokens, group, start, stop):
    """Tokens as their pages hold them: [layers, 2, heads, tokens of the page, head_dim] page by page."""
    found = b""
    while start < stop:
        end = min(stop, (start // PAGE_TOKENS + 1) * PAGE_TOKENS)
        found += np.moveaxis(np.stack([token[group] for token in tokens[start:end]]), 0, 3).tobytes()
        start = end
    return found


@pytest.fixture(scope="module")
def model():
    return model_shape(open_checkpoint(tiny("4b")).config)


slots, numbers = st.integers(0, SLOTS - 1), st.integers(0, 9)
actions = st.one_of(
    st.tuples(st.just("append"), slots, st.sampled_from((1, 30, 70)), st.booleans()),
    st.tuples(st.just("block"), slots, numbers),
    st.tuples(st.just("tail"), slots),
    st.tuples(st.just("save"), slots),
    st.tuples(st.just("load"), slots, numbers),
    st.tuples(st.just("wait"), numbers),
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(actions, min_size=6, max_size=24), seed=st.integers(0, 99))
def test_a_copy_holds_what_was_there_when_it_began(model, steps, seed):
    found = Slots(model)
    for slot in range(SLOTS):
        found.append(slot, 90, anew=True)
    for action, *arguments in steps:
        getattr(found, action)(*arguments)
    for slot in range(SLOTS):
        found.append(slot, 1, anew=False)
        found.save(slot)
    found.check(seed)


def test_decoding_goes_on_while_a_tail_leaves_until_the_ring_has_gone_round(model):
    found = Slots(model)
    found.append(0, 70, anew=True)
    found.tail(0)
    ring = found.kv.ring.shape[1] * PAGE_TOKENS
    free = (70 - found.kv.layout.window) // PAGE_TOKENS * PAGE_TOKENS + ring - 70
    assert free > 40
    for _ in range(free):
        found.append(0, 1, anew=False)
    transfer, _, _ = found.leaving[0]
    assert not transfer.done(), "a step waited for a copy that it does not disturb"
    found.append(0, 1, anew=False)
    assert transfer.done()
    found.check(0)


def test_a_sequence_that_begins_anew_waits_for_what_leaves_its_slot(model):
    found = Slots(model)
    found.append(0, 100, anew=True)
    found.block(0, 0)
    found.append(1, 30, anew=True)
    transfer, _, _ = found.leaving[0]
    assert not transfer.done()
    found.append(0, 1, anew=True)
    assert transfer.done()
    found.check(0)
