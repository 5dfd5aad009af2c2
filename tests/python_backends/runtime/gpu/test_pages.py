"""Page tables: no page has two owners or is lost, whatever slots do; rings never overwrite a window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from python_backends.errors import InternalError
from python_backends.runtime.gpu.pages import PAGE_TOKENS, PageTable, ring_pages, ring_table

SLOTS, PER_SLOT = 3, 5


class Tables(RuleBasedStateMachine):
    """Slots grow and shrink at random, with fewer pages than all of them could want."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageTable(SLOTS, PER_SLOT, 11)
        self.lengths = [0] * SLOTS

    @rule(slot=st.integers(0, SLOTS - 1), length=st.integers(0, (PER_SLOT + 1) * PAGE_TOKENS))
    def grow(self, slot: int, length: int) -> None:
        before = self.pages.table.copy()
        if not self.pages.can_grow(slot, length):
            with pytest.raises(InternalError, match="no pages"):
                self.pages.grow(slot, length)
            assert (self.pages.table == before).all()
            return
        changed = self.pages.grow(slot, length)
        assert changed == bool((self.pages.table != before).any())
        self.lengths[slot] = max(self.lengths[slot], length)

    @rule(slot=st.integers(0, SLOTS - 1), length=st.integers(0, PER_SLOT * PAGE_TOKENS))
    def shrink(self, slot: int, length: int) -> None:
        before = self.pages.table.copy()
        changed = self.pages.shrink(slot, length)
        assert changed == bool((self.pages.table != before).any())
        self.lengths[slot] = min(self.lengths[slot], length)

    @invariant()
    def whole(self) -> None:
        self.pages.check_integrity()
        wanted = [-(-length // PAGE_TOKENS) for length in self.lengths]
        assert self.pages.owned.tolist() == wanted
        assert self.pages.free_pages == 10 - sum(wanted)


TestTables = Tables.TestCase


@given(window=st.integers(1, 300), lookahead=st.integers(1, 64), newest=st.integers(0, 2000))
def test_a_ring_keeps_the_window_of_the_newest_token_while_tokens_beyond_it_are_written(window, lookahead, newest):
    pages = ring_pages(window, lookahead)
    holds: dict[int, int] = {}
    for position in range(newest + lookahead + 1):
        place = position // PAGE_TOKENS % pages * PAGE_TOKENS + position % PAGE_TOKENS
        holds[place] = position
    kept = set(holds.values())
    assert set(range(max(0, newest - window + 1), newest + lookahead + 1)) <= kept


def test_rings_of_slots_do_not_meet():
    table = ring_table(4, 3)
    assert sorted(table.reshape(-1).tolist()) == list(range(12))
