"""The scheduler alone: random arrivals, ends and steps, with every invariant checked after each."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from python_backends.decoder.scheduler import Scheduler

SLOTS, CHUNK, QUEUE, IMAGE = 3, 8, 4, 5


@st.composite
def prompts(draw):
    """(length, image spans): images of IMAGE tokens, in order, apart or side by side."""
    spans, end = [], 0
    for gap in draw(st.lists(st.integers(0, 6), max_size=4)):
        spans.append((end + gap, end + gap + IMAGE))
        end += gap + IMAGE
    return end + draw(st.integers(1, 20)), tuple(spans)


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(SLOTS, CHUNK, QUEUE)
        self.next_id = 0
        self.expected_start = {}
        self.arrival = []

    @precondition(lambda self: self.scheduler.can_add())
    @rule(prompt=prompts())
    def add(self, prompt):
        length, spans = prompt
        self.scheduler.add(self.next_id, length, spans)
        self.expected_start[self.next_id] = 0
        self.arrival.append(self.next_id)
        self.next_id += 1

    @rule(data=st.data())
    def remove(self, data):
        known = sorted(self.expected_start)
        if known:
            chosen = data.draw(st.sampled_from(known))
            self.scheduler.remove(chosen)
            del self.expected_start[chosen]
            self.arrival.remove(chosen)

    @rule()
    def step(self):
        step = self.scheduler.schedule()
        assert (step is None) == (not self.expected_start), "there is work exactly when there are sequences"
        if step is None:
            return
        assert [row.slot for row in step.rows] == sorted({row.slot for row in step.rows})
        assert any(row.count for row in step.rows), "a step does something"
        for row in step.rows:
            assert row.start == self.expected_start[row.sequence_id]
            assert row.count <= max(CHUNK, IMAGE)
            self.scheduler.computed(row)
            self.expected_start[row.sequence_id] += row.count

    @invariant()
    def holds(self):
        self.scheduler.check_integrity()

    @invariant()
    def oldest_run(self):
        running = set(self.scheduler.running)
        assert len(self.scheduler.waiting) <= QUEUE
        waiting = list(self.scheduler.waiting)
        assert waiting == [sequence for sequence in self.arrival if sequence not in running]


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_prompt_is_computed_in_chunks_that_keep_images_whole():
    scheduler = Scheduler(1, 8, 1)
    scheduler.add(7, 24, [(3, 8), (10, 20)])
    spans = []
    while True:
        (row,) = scheduler.schedule().rows
        spans.append((row.start, row.start + row.count))
        scheduler.computed(row)
        if row.samples:
            break
    assert spans == [(0, 8), (8, 10), (10, 20), (20, 24)]


def test_decode_goes_on_between_the_chunks_of_a_long_prompt():
    scheduler = Scheduler(2, 4, 1)
    scheduler.add(0, 1)
    scheduler.computed(scheduler.schedule().rows[0])
    scheduler.add(1, 40)
    kinds = []
    for _ in range(8):
        step = scheduler.schedule()
        kinds.append(step.kind)
        for row in step.rows:
            scheduler.computed(row)
    assert kinds == ["decode", "prefill"] * 4


def test_the_queue_is_bounded_and_a_freed_slot_goes_to_the_oldest():
    scheduler = Scheduler(1, 4, 2)
    for sequence in range(3):
        assert scheduler.can_add()
        scheduler.add(sequence, 2)
        scheduler.schedule()
    assert not scheduler.can_add()
    scheduler.remove(0)
    assert scheduler.schedule().rows[0].sequence_id == 1


def test_adding_a_sequence_twice_or_without_tokens_is_refused():
    scheduler = Scheduler(1, 4, 2)
    scheduler.add(0, 2)
    with pytest.raises(ValueError, match="here already"):
        scheduler.add(0, 2)
    with pytest.raises(ValueError, match="at least one token"):
        scheduler.add(1, 0)
