"""Which page holds which tokens of which slot: ids and counts only, no memory.

Two groups of layers have tables of their own. Global layers keep everything, so a slot's table grows with its length
and pages come from one free list. Local layers keep a window, so a slot owns a ring of pages for good.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from python_backends.errors import InternalError

PAGE_TOKENS = 64
"""Tokens of a page."""


def ring_pages(window: int, lookahead: int) -> int:
    """Pages of a local layer's ring: writing ``lookahead`` tokens past the newest one overwrites none of its window."""
    return -(-(window + lookahead) // PAGE_TOKENS) + 1


class PageTable:
    """The global layers' pages: ``table[slot, i]`` holds tokens ``64·i … 64·i + 63`` of the slot.

    Invariants (`check_integrity`): every page is free or owned by one slot, never both; a slot's pages are a prefix of
    its row; behind them the row repeats page 0, which a kernel may read but never use.
    """

    def __init__(self, num_slots: int, pages_per_slot: int, num_pages: int) -> None:
        """``num_pages`` in all; page 0 is nobody's, so that an entry that is not set is still an address."""
        self.table: NDArray[np.int32] = np.zeros((num_slots, pages_per_slot), np.int32)
        self.owned: NDArray[np.int32] = np.zeros(num_slots, np.int32)
        self._num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def free_pages(self) -> int:
        """Pages that no slot owns."""
        return len(self._free)

    def can_grow(self, slot: int, length: int) -> bool:
        """Whether `grow` would succeed."""
        return _pages(length) <= self.table.shape[1] and _pages(length) - int(self.owned[slot]) <= len(self._free)

    def grow(self, slot: int, length: int) -> bool:
        """Give the slot pages for ``length`` tokens in all; says whether the table changed.

        Raises:
            InternalError: a longer slot than there can be, or no page is free.
        """
        if not self.can_grow(slot, length):
            raise InternalError(f"no pages for {length} tokens in slot {slot}: {len(self._free)} free")
        wanted, owned = _pages(length), int(self.owned[slot])
        for index in range(owned, wanted):
            self.table[slot, index] = self._free.pop()
        self.owned[slot] = max(owned, wanted)
        return wanted > owned

    def shrink(self, slot: int, length: int) -> bool:
        """Take back the pages behind ``length`` tokens; says whether the table changed."""
        wanted, owned = _pages(length), int(self.owned[slot])
        for index in range(owned - 1, wanted - 1, -1):
            self._free.append(int(self.table[slot, index]))
            self.table[slot, index] = 0
        self.owned[slot] = min(owned, wanted)
        return wanted < owned

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant does not hold."""
        used = [int(page) for slot, count in enumerate(self.owned) for page in self.table[slot, :count]]
        assert len(set(used)) == len(used), "a page has two owners"
        assert not set(used) & set(self._free), "a page is free and owned"
        assert sorted([*used, *self._free]) == list(range(1, self._num_pages)), "a page was lost"
        for slot, count in enumerate(self.owned):
            assert not self.table[slot, count:].any(), "an entry behind the slot's pages"


def ring_table(num_slots: int, pages: int) -> NDArray[np.int32]:
    """The local layers' table: slot s owns pages ``s·pages … s·pages + pages − 1``."""
    return np.arange(num_slots * pages, dtype=np.int32).reshape(num_slots, pages)


def _pages(length: int) -> int:
    return -(-length // PAGE_TOKENS)
