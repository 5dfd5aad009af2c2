"""Who computes what in the next step: ids and counts only, no tensors, no clock of its own.

A step is either one prefill chunk of one sequence or one token for every decoding sequence. Where both kinds of work
exist they alternate, so a long prompt delays the others by one chunk at a time. Sequences get slots first come, first
served; the lowest free slot is taken, so that the rows of a decode step lie close together.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Span = tuple[int, int]
"""[start, end) positions of one image's tokens, which are never split by a chunk."""


@dataclass(frozen=True)
class Row:
    """One sequence's share of a step: ``count`` tokens from position ``start``; 0 where it only holds its slot."""

    sequence_id: int
    slot: int
    start: int
    count: int
    samples: bool
    """The row's last token yields a new one; False for a chunk that leaves more of the prompt to do."""


@dataclass(frozen=True)
class Step:
    """Work for one run of the runtime; rows in rising slot order."""

    kind: Literal["prefill", "decode"]
    rows: tuple[Row, ...]


@dataclass
class _Work:
    """One sequence. Invariant: ``computed`` ≤ ``length``; a decoding sequence has exactly one token not computed."""

    sequence_id: int
    length: int
    images: tuple[Span, ...]
    computed: int = 0
    slot: int | None = None
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = self.length

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt_length


class Scheduler:
    """Gives out slots and steps.

    Args:
        num_slots: sequences that can be computed at once.
        prefill_chunk: most tokens of one chunk; a single image longer than that still goes whole.
        max_queue: sequences that may wait for a slot.
    """

    def __init__(self, num_slots: int, prefill_chunk: int, max_queue: int) -> None:
        self.num_slots = num_slots
        self._prefill_chunk = prefill_chunk
        self._max_queue = max_queue
        self._waiting: OrderedDict[int, _Work] = OrderedDict()
        self._running: dict[int, _Work] = {}
        self._free_slots = list(range(num_slots))
        self._prefilled_last = False

    @property
    def waiting(self) -> tuple[int, ...]:
        """Sequences without a slot, oldest first."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[int, ...]:
        """Sequences with a slot."""
        return tuple(self._running)

    def can_add(self) -> bool:
        """Whether a slot is free or the queue has room."""
        return bool(self._free_slots) or len(self._waiting) < self._max_queue

    def add(self, sequence_id: int, prompt_length: int, images: Sequence[Span] = ()) -> None:
        """Queue a sequence of ``prompt_length`` tokens; ``images`` in rising order, without overlap."""
        if sequence_id in self._waiting or sequence_id in self._running:
            raise ValueError(f"sequence {sequence_id} is here already")
        if prompt_length < 1:
            raise ValueError("a prompt has at least one token")
        self._waiting[sequence_id] = _Work(sequence_id, prompt_length, tuple(images))
        self._admit()

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence, wherever it is, and free its slot."""
        if self._waiting.pop(sequence_id, None) is not None:
            return
        work = self._running.pop(sequence_id)
        assert work.slot is not None
        heapq.heappush(self._free_slots, work.slot)
        self._admit()

    def schedule(self) -> Step | None:
        """The next step, or None where there is nothing to do. `computed` must follow before the next call."""
        prefilling = [work for work in self._running.values() if work.prefilling]
        decoding = [work for work in self._running.values() if not work.prefilling]
        if prefilling and not (decoding and self._prefilled_last):
            self._prefilled_last = True
            return Step("prefill", (self._chunk(prefilling[0]),))
        self._prefilled_last = False
        if not decoding:
            return None
        rows = [Row(work.sequence_id, _slot(work), work.computed, 1, samples=True) for work in decoding]
        rows += [Row(work.sequence_id, _slot(work), work.computed, 0, samples=False) for work in prefilling]
        return Step("decode", tuple(sorted(rows, key=lambda row: row.slot)))

    def computed(self, row: Row) -> None:
        """Note that a row ran; one that samples has grown its sequence by a token."""
        work = self._running[row.sequence_id]
        work.computed += row.count
        if row.samples:
            work.length += 1

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant does not hold."""
        used = [_slot(work) for work in self._running.values()]
        assert sorted(used + self._free_slots) == list(range(self.num_slots)), "slots lost or given twice"
        assert not set(self._waiting) & set(self._running), "a sequence both waits and runs"
        assert not (self._waiting and self._free_slots), "a sequence waits beside a free slot"
        assert len(self._waiting) <= self._max_queue, "more wait than the queue holds"
        for work in self._waiting.values():
            assert work.slot is None, "a waiting sequence holds a slot"
            assert work.computed == 0, "a waiting sequence was computed"
        for work in self._running.values():
            assert work.prefilling or work.length == work.computed + 1, "a decoding sequence is not one token ahead"
            for start, end in work.images:
                assert not start < work.computed < end, "an image was split"

    def _admit(self) -> None:
        while self._waiting and self._free_slots:
            sequence_id, work = self._waiting.popitem(last=False)
            work.slot = heapq.heappop(self._free_slots)
            self._running[sequence_id] = work

    def _chunk(self, work: _Work) -> Row:
        start = work.computed
        end = min(work.prompt_length, start + self._prefill_chunk)
        for image_start, image_end in work.images:
            if image_start < end < image_end:
                end = image_start if image_start > start else image_end
        return Row(work.sequence_id, _slot(work), start, end - start, samples=end == work.prompt_length)


def _slot(work: _Work) -> int:
    assert work.slot is not None
    return work.slot
