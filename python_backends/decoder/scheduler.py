"""Who computes what in the next step: ids and counts only, no tensors, no clock.

A step is either one prefill chunk of one sequence or one decode row for every decoding sequence. Where both kinds of
work exist they alternate, and the chunk is cut to the budget the caller gives, so a long prompt delays the others'
tokens by a known amount.

Order of admission: the lower ``priority`` value first, then shorter work, then the older. Nobody starves, by two
bounds: at most ``max_overtakes`` sequences that arrived later are admitted before any sequence that waits, and where
slots stay taken a running sequence is set aside once it has had ``quantum`` tokens since it was admitted. It then
counts as the newest arrival, so those that wait already go first.

The rows of a decode step run from the lowest to the highest slot that decodes. Sequences take the lowest free slot and
are moved down one a step while more than half of the slots in that range are free, which bounds the padding at one half
where no prompt is being computed between them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

UNLIMITED = 2**31

Span = tuple[int, int]
"""[start, end) positions of one image's tokens, which are never split by a chunk."""


@dataclass(frozen=True)
class Row:
    """One sequence's share of a step: ``count`` tokens, at least one, from position ``start``."""

    sequence_id: int
    slot: int
    start: int
    count: int
    samples: bool
    """The row's last token yields a new one; False for a chunk that leaves more of the prompt to do."""


@dataclass(frozen=True)
class Move:
    """A sequence whose ``length`` computed tokens leave or enter a slot before the step runs."""

    sequence_id: int
    slot: int
    length: int


Moves = tuple[Move, ...]


@dataclass(frozen=True)
class Step:
    """Work for one run of the runtime; rows in rising slot order. Moves out come before moves in."""

    kind: Literal["prefill", "decode"]
    rows: tuple[Row, ...]
    set_aside: Moves = ()
    resume: Moves = ()


@dataclass
class _Work:
    """One sequence. Invariant: ``computed`` ≤ ``length``; a decoding sequence has exactly one token not computed."""

    sequence_id: int
    arrival: int
    priority: int
    size: int
    length: int
    images: tuple[Span, ...]
    boundaries: tuple[int, ...]
    """Positions no chunk crosses."""
    largest_chunk: int
    computed: int
    held: bool
    """Waits for something else than a slot."""
    started: bool = False
    """Had a slot once, so its place in the queue is not the queue's to bound."""
    slot: int | None = None
    overtaken: int = 0
    """Admissions of sequences that arrived later, while this one waited."""
    since_admission: int = 0
    """Tokens drawn since it was last given a slot."""
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = self.length

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt_length

    @property
    def order(self) -> tuple[int, int, int]:
        return self.priority, self.size, self.arrival


class Scheduler:
    """Gives out slots and steps.

    Args:
        num_slots: sequences that can be computed at once.
        max_queue: sequences that may wait for their first slot.
        max_overtakes: later sequences that may be admitted before one that waits.
        quantum: tokens a sequence may draw before it can be set aside for one of its own priority; None: never.
    """

    def __init__(self, num_slots: int, max_queue: int, max_overtakes: int = 8, quantum: int | None = None) -> None:
        self.num_slots = num_slots
        self._max_queue = max_queue
        self._max_overtakes = max_overtakes
        self._quantum = quantum
        self._arrivals = itertools.count()
        self._waiting: dict[int, _Work] = {}
        self._running: dict[int, _Work] = {}
        self._free_slots = list(range(num_slots))
        self._prefilled_last = False

    @property
    def waiting(self) -> tuple[int, ...]:
        """Sequences without a slot, oldest first; those set aside among them."""
        return tuple(work.sequence_id for work in sorted(self._waiting.values(), key=lambda work: work.arrival))

    @property
    def queued(self) -> tuple[int, ...]:
        """Sequences that never had a slot, oldest first."""
        return tuple(each for each in self.waiting if not self._waiting[each].started)

    @property
    def running(self) -> tuple[int, ...]:
        """Sequences with a slot."""
        return tuple(self._running)

    @property
    def decoding(self) -> int:
        """Sequences whose prompt is done and that hold a slot."""
        return sum(1 for work in self._running.values() if not work.prefilling)

    def place(self, sequence_id: int) -> tuple[int, int] | None:
        """(slot, tokens computed in it) of a sequence; None without a slot."""
        work = self._running.get(sequence_id)
        return None if work is None else (_slot(work), work.computed)

    def can_add(self, count: int = 1) -> bool:
        """Whether the queue has room for so many; a free slot counts as room, a sequence set aside as waiting."""
        return len(self._waiting) + count <= self._max_queue + len(self._free_slots)

    def add(
        self,
        sequence_id: int,
        prompt_length: int,
        images: Sequence[Span] = (),
        *,
        priority: int = 0,
        size: int = 0,
        boundaries: Sequence[int] = (),
        largest_chunk: int = UNLIMITED,
        computed: int = 0,
        held: bool = False,
    ) -> None:
        """Queue a sequence.

        Args:
            sequence_id: not in use.
            prompt_length: tokens, at least 1.
            images: in rising order, without overlap.
            priority: lower is sooner.
            size: tokens it may need in all, for shorter work first.
            boundaries: positions that a chunk ends at, so that what is computed up to there can be shared; within no
                image.
            largest_chunk: tokens of a chunk, whatever the budget.
            computed: tokens that the caller holds already; it gets a move to put them into the slot.
            held: gets no slot before `release`; it keeps its place in the queue.
        """
        if sequence_id in self._waiting or sequence_id in self._running:
            raise ValueError(f"sequence {sequence_id} is here already")
        if prompt_length < 1:
            raise ValueError("a prompt has at least one token")
        self._waiting[sequence_id] = _Work(
            sequence_id,
            arrival=next(self._arrivals),
            priority=priority,
            size=size,
            length=prompt_length,
            images=tuple(images),
            boundaries=tuple(sorted(boundaries)),
            largest_chunk=largest_chunk,
            computed=computed,
            held=held,
        )

    def hold(self, sequence_id: int) -> None:
        """Take a sequence that draws nothing yet off its slot, or out of the queue's turn; it has nothing computed."""
        work = self._running.pop(sequence_id, None)
        if work is not None:
            heapq.heappush(self._free_slots, _slot(work))
            work.slot = None
            self._waiting[sequence_id] = work
        work = self._waiting[sequence_id]
        work.held, work.computed = True, 0

    def release(self, sequence_id: int, computed: int = 0) -> None:
        """End the hold; the caller has ``computed`` tokens for the slot."""
        work = self._waiting[sequence_id]
        work.held, work.computed = False, computed

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence, wherever it is, and free its slot."""
        if self._waiting.pop(sequence_id, None) is not None:
            return
        work = self._running.pop(sequence_id)
        heapq.heappush(self._free_slots, _slot(work))

    def schedule(self, prefill_budget: int) -> Step | None:
        """The next step, or None where there is nothing to do. `computed` must follow for every row.

        Args:
            prefill_budget: most tokens of a chunk; a single image longer than that still goes whole.
        """
        resume = self._admit()
        set_aside, entered = self._make_room() if resume or self._candidate() else self._compact()
        moves = (set_aside, resume + entered)
        prefilling = [work for work in self._running.values() if work.prefilling]
        decoding = [work for work in self._running.values() if not work.prefilling]
        if prefilling and not (decoding and self._prefilled_last):
            self._prefilled_last = True
            first = min(prefilling, key=lambda work: (work.priority, work.prompt_length - work.computed, work.arrival))
            return Step("prefill", (_chunk(first, prefill_budget),), *moves)
        self._prefilled_last = False
        if not decoding:
            return None
        rows = [Row(work.sequence_id, _slot(work), work.computed, 1, samples=True) for work in decoding]
        return Step("decode", tuple(sorted(rows, key=lambda row: row.slot)), *moves)

    def computed(self, row: Row, drawn: int = 1) -> None:
        """Note that a row ran. One that samples has grown its sequence by ``drawn`` tokens, all but the last computed.

        ``drawn`` above 1 is what speculative decoding accepted.
        """
        work = self._running[row.sequence_id]
        if not row.samples:
            work.computed += row.count
            return
        base = work.computed + row.count if work.prefilling else work.computed + 1
        work.computed = base + drawn - 1
        work.length = work.computed + 1
        work.since_admission += drawn

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant does not hold."""
        used = [_slot(work) for work in self._running.values()]
        assert sorted(used + self._free_slots) == list(range(self.num_slots)), "slots lost or given twice"
        assert not set(self._waiting) & set(self._running), "a sequence both waits and runs"
        assert len(self.queued) <= self._max_queue + self.num_slots, "more wait than the queue holds"
        for work in self._waiting.values():
            assert work.slot is None, "a waiting sequence holds a slot"
            assert not (work.held and work.computed), "a sequence on hold has tokens to move in"
            assert work.overtaken <= self._max_overtakes, "a waiting sequence was overtaken too often"
        for work in self._running.values():
            assert work.prefilling or work.length == work.computed + 1, "a decoding sequence is not one token ahead"
            for start, end in work.images:
                assert not start < work.computed < end, "an image was split"

    def _candidate(self) -> _Work | None:
        """Whose turn it is: the oldest of those overtaken often enough, else by priority, work and age."""
        ready = [work for work in self._waiting.values() if not work.held]
        tired = [work for work in ready if work.overtaken >= self._max_overtakes]
        if tired:
            return min(tired, key=lambda work: work.arrival)
        return min(ready, key=lambda work: work.order, default=None)

    def _admit(self) -> Moves:
        moves: Moves = ()
        while self._free_slots and (work := self._candidate()):
            moves += self._enter(work)
        return moves

    def _enter(self, work: _Work) -> Moves:
        """Give a slot; one move for a sequence that was set aside."""
        del self._waiting[work.sequence_id]
        for other in self._waiting.values():
            other.overtaken += other.arrival < work.arrival and not other.held
        work.slot = heapq.heappop(self._free_slots)
        work.since_admission = 0
        work.overtaken = 0
        work.started = True
        self._running[work.sequence_id] = work
        return (Move(work.sequence_id, work.slot, work.computed),) if work.computed else ()

    def _make_room(self) -> tuple[Moves, Moves]:
        """Set one running sequence aside where the one whose turn it is must not wait for it to end: (out, in)."""
        if self._quantum is None or self._free_slots or not (work := self._candidate()):
            return (), ()
        victims = [each for each in self._running.values() if self._may_set_aside(each, work)]
        if not victims:
            return (), ()
        victim = max(victims, key=lambda each: (each.priority, each.since_admission, each.arrival))
        del self._running[victim.sequence_id]
        out = (Move(victim.sequence_id, _slot(victim), victim.computed),)
        heapq.heappush(self._free_slots, _slot(victim))
        victim.slot = None
        victim.arrival = next(self._arrivals)  # behind those that wait already: it has had its share for now
        entered = self._enter(work)
        self._waiting[victim.sequence_id] = victim
        return out, entered

    def _compact(self) -> tuple[Moves, Moves]:
        """Move the sequence in the highest slot down where more than half of a decode step's rows are idle."""
        if not self._free_slots or not self._running:
            return (), ()
        highest = max(self._running.values(), key=_slot)
        lowest = min(_slot(work) for work in self._running.values())
        span = _slot(highest) - lowest + 1
        target = next((slot for slot in sorted(self._free_slots) if lowest < slot < _slot(highest)), None)
        if target is None or span <= 2 * len(self._running):
            return (), ()
        out = (Move(highest.sequence_id, _slot(highest), highest.computed),)
        self._free_slots.remove(target)
        heapq.heapify(self._free_slots)
        heapq.heappush(self._free_slots, _slot(highest))
        highest.slot = target
        return (out, (Move(highest.sequence_id, target, highest.computed),)) if highest.computed else ((), ())

    def _may_set_aside(self, running: _Work, waiting: _Work) -> bool:
        """A prompt is never left half computed, and everyone computes something between two moves."""
        assert self._quantum is not None
        if running.prefilling or not running.since_admission:
            return False
        tired = waiting.overtaken >= self._max_overtakes
        if running.since_admission >= self._quantum:
            return tired or waiting.priority <= running.priority
        return waiting.priority < running.priority and not tired


def _chunk(work: _Work, budget: int) -> Row:
    start = work.computed
    end = min(work.prompt_length, start + max(1, min(budget, work.largest_chunk)))
    end = next((boundary for boundary in work.boundaries if start < boundary < end), end)
    for image_start, image_end in work.images:
        if image_start < end < image_end:
            end = image_start if image_start > start else image_end
    return Row(work.sequence_id, _slot(work), start, end - start, samples=end == work.prompt_length)


def _slot(work: _Work) -> int:
    assert work.slot is not None
    return work.slot
