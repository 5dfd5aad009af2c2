"""The scheduler alone: random arrivals, ends and steps, with every invariant checked after each."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from python_backends.decoder.scheduler import Scheduler

SLOTS, QUEUE, IMAGE, OVERTAKES, QUANTUM = 3, 6, 5, 2, 4


@st.composite
def prompts(draw):
    """(length, image spans): images of IMAGE tokens, in order, apart or side by side."""
    spans, end = [], 0
    for gap in draw(st.lists(st.integers(0, 6), max_size=4)):
        spans.append((end + gap, end + gap + IMAGE))
        end += gap + IMAGE
    return end + draw(st.integers(1, 20)), tuple(spans)


class SchedulerMachine(RuleBasedStateMachine):
    """A model of the engine: it does what a step says and checks the step against what it knows itself."""

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(SLOTS, QUEUE, OVERTAKES, QUANTUM)
        self.next_id = 0
        self.done = {}  # tokens computed
        self.prompt = {}
        self.slots = {}  # slot → sequence whose cache is in it
        self.aside = {}  # sequence → length
        self.spans, self.cuts = {}, {}
        self.held = set()
        self.order = []
        self.arrived = {}  # order of arrival; who is set aside arrives anew
        self.waited = {}  # admissions of later arrivals while waiting for a slot

    @precondition(lambda self: self.scheduler.can_add())
    @rule(prompt=prompts(), priority=st.integers(-1, 1), size=st.integers(0, 3))
    def add(self, prompt, priority, size):
        length, spans = prompt
        self.scheduler.add(self.next_id, length, spans, priority=priority, size=size)
        self.done[self.next_id] = 0
        self.prompt[self.next_id] = length
        self.arrive(self.next_id)
        self.waited[self.next_id] = 0
        self.next_id += 1

    @precondition(lambda self: self.scheduler.can_add())
    @rule(prompt=prompts(), priority=st.integers(-1, 1), cuts=st.lists(st.integers(1, 30), max_size=3))
    def add_held(self, prompt, priority, cuts):
        """A prompt of which something may be found elsewhere, with positions that chunks must end at."""
        length, spans = prompt
        inside = [cut for cut in cuts if cut < length and not any(a < cut < b for a, b in spans)]
        self.scheduler.add(self.next_id, length, spans, priority=priority, boundaries=inside, held=True)
        self.done[self.next_id], self.prompt[self.next_id] = 0, length
        self.spans[self.next_id], self.cuts[self.next_id] = spans, inside
        self.arrive(self.next_id)
        self.held.add(self.next_id)
        self.next_id += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data(), found=st.integers(0, 30))
    def release(self, data, found):
        chosen = data.draw(st.sampled_from(sorted(self.held)))
        inside = any(a < found < b for a, b in self.spans[chosen])
        computed = 0 if inside or found >= self.prompt[chosen] else found
        self.scheduler.release(chosen, computed)
        self.held.remove(chosen)
        self.done[chosen] = computed
        if computed:
            self.aside[chosen] = computed
        self.waited[chosen] = 0

    @rule(data=st.data())
    def hold(self, data):
        """What was to be moved in could not be."""
        running = [each for each in self.scheduler.running if self.done[each] < self.prompt[each] and each in self.cuts]
        if running:
            chosen = data.draw(st.sampled_from(running))
            self.scheduler.hold(chosen)
            self.slots = {slot: each for slot, each in self.slots.items() if each != chosen}
            self.done[chosen] = 0
            self.held.add(chosen)

    @rule(data=st.data())
    def remove(self, data):
        known = sorted(self.done)
        if known:
            chosen = data.draw(st.sampled_from(known))
            self.scheduler.remove(chosen)
            for kept in (self.done, self.prompt, self.aside, self.waited):
                kept.pop(chosen, None)
            self.held.discard(chosen)
            self.slots = {slot: each for slot, each in self.slots.items() if each != chosen}

    @rule(budget=st.integers(1, 12), accepted=st.integers(1, 3))
    def step(self, budget, accepted):
        before = set(self.scheduler.running)
        step = self.scheduler.schedule(budget)
        assert (step is None) == (not set(self.done) - self.held), "there is work exactly when there are sequences"
        assert not self.held & set(self.scheduler.running), "a sequence on hold has a slot"
        if step is None:
            return
        self.follow_moves(step)
        self.count_overtakes(before, step)
        assert [row.slot for row in step.rows] == sorted({row.slot for row in step.rows})
        assert all(row.count for row in step.rows), "every row does something"
        for row in step.rows:
            assert self.slots.setdefault(row.slot, row.sequence_id) == row.sequence_id, "another's cache is in the slot"
            assert row.start == self.done[row.sequence_id]
            assert not any(row.start < cut < row.start + row.count for cut in self.cuts.get(row.sequence_id, ()))
            assert row.count <= max(budget, IMAGE)
            decoding = row.start >= self.prompt[row.sequence_id]
            drawn = accepted if decoding and row.samples else 1
            self.scheduler.computed(row, drawn)
            self.done[row.sequence_id] += drawn if decoding and row.samples else row.count

    def follow_moves(self, step):
        for move in step.set_aside:
            assert self.slots.pop(move.slot) == move.sequence_id
            assert self.done[move.sequence_id] == move.length
            self.aside[move.sequence_id] = move.length
        for move in step.resume:
            assert move.slot not in self.slots
            assert self.aside.pop(move.sequence_id) == move.length
            self.slots[move.slot] = move.sequence_id

    def arrive(self, sequence):
        self.arrived[sequence] = len(self.order)
        self.order.append(sequence)

    def count_overtakes(self, before, step):
        for move in step.set_aside:
            if move.sequence_id not in self.scheduler.running:  # not only moved down
                self.arrive(move.sequence_id)
                self.waited[move.sequence_id] = 0
        for entered in set(self.scheduler.running) - before:
            self.waited.pop(entered, None)
            for other in self.waited:
                self.waited[other] += self.arrived[other] < self.arrived[entered]

    @invariant()
    def holds(self):
        self.scheduler.check_integrity()

    @invariant()
    def nobody_is_overtaken_without_bound(self):
        assert all(count <= OVERTAKES for count in self.waited.values())


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


def run(scheduler, steps, budget=4):
    """What each step was, as (kind, sequences that drew a token)."""
    seen = []
    for _ in range(steps):
        step = scheduler.schedule(budget)
        for row in step.rows:
            scheduler.computed(row)
        seen.append((step.kind, tuple(row.sequence_id for row in step.rows if row.samples)))
    return seen


def test_a_prompt_is_computed_in_chunks_that_keep_images_whole():
    scheduler = Scheduler(1, 1)
    scheduler.add(7, 24, [(3, 8), (10, 20)])
    spans = []
    while True:
        (row,) = scheduler.schedule(8).rows
        spans.append((row.start, row.start + row.count))
        scheduler.computed(row)
        if row.samples:
            break
    assert spans == [(0, 8), (8, 10), (10, 20), (20, 24)]


def test_decode_goes_on_between_the_chunks_of_a_long_prompt():
    scheduler = Scheduler(2, 1)
    scheduler.add(0, 1)
    run(scheduler, 1)
    scheduler.add(1, 40)
    assert [kind for kind, _ in run(scheduler, 8)] == ["decode", "prefill"] * 4


def test_priority_goes_first_then_shorter_work_then_the_older():
    scheduler = Scheduler(1, 9)
    scheduler.add(0, 3, size=9)
    scheduler.add(1, 3, size=5)
    scheduler.add(2, 3, size=5)
    scheduler.add(3, 3, size=99, priority=-1)
    order = []
    for _ in range(4):
        scheduler.schedule(4)
        order += scheduler.running
        scheduler.remove(order[-1])
    assert order == [3, 1, 2, 0]


def test_a_stream_of_short_requests_cannot_starve_a_long_one():
    scheduler = Scheduler(1, 100, max_overtakes=3)
    scheduler.add(0, 3, size=1)
    scheduler.schedule(4)
    scheduler.add(1, 3, size=1000)
    order = []
    for new in range(2, 20):
        scheduler.add(new, 3, size=1)
        scheduler.remove(scheduler.running[0])
        scheduler.schedule(4)
        order += scheduler.running
    assert order.index(1) == 3


arrivals = st.lists(
    st.tuples(
        st.integers(0, 30),  # steps after the one before
        st.integers(1, 40),  # prompt
        st.integers(-2, 2),  # priority
        st.integers(0, 99),  # size
        st.integers(1, 25),  # tokens of the answer
    ),
    min_size=2,
    max_size=20,
)
BUDGET, LONGEST_PROMPT, LONGEST_ANSWER = 8, 40, 25


def longest_waits(scheduler, coming, steps):
    """For every time a sequence was without a slot: (steps it took, sequences that waited already when it began)."""
    coming = [list(each) for each in coming]
    left, waiting, waits = {}, {}, []
    for now in range(steps):
        while coming and coming[0][0] == 0:
            _, length, priority, size, tokens = coming.pop(0)
            sequence = len(left) + 1
            waiting[sequence] = (now, len(scheduler.waiting))
            scheduler.add(sequence, length, priority=priority, size=size)
            left[sequence] = tokens
        if coming:
            coming[0][0] -= 1
        before = len(scheduler.waiting)
        step = scheduler.schedule(BUDGET)
        for sequence in scheduler.waiting:
            waiting.setdefault(sequence, (now, before))  # it was set aside
        for sequence in scheduler.running:
            if sequence in waiting:
                since, ahead = waiting.pop(sequence)
                waits.append((now - since, ahead))
        for row in step.rows if step else ():
            scheduler.computed(row)
            left[row.sequence_id] -= row.samples
            if not left[row.sequence_id]:
                scheduler.remove(row.sequence_id)
        scheduler.check_integrity()
    return waits + [(steps - since, ahead) for since, ahead in waiting.values()]


@settings(deadline=None)
@given(coming=arrivals, slots=st.integers(1, 4), overtakes=st.integers(0, 4), quantum=st.sampled_from([None, 1, 7]))
def test_a_wait_is_bounded_whatever_the_priorities_where_answers_end(coming, slots, overtakes, quantum):
    scheduler = Scheduler(slots, 99, overtakes, quantum)
    between = 2 * slots * -(-LONGEST_PROMPT // BUDGET) + LONGEST_ANSWER + 1  # steps from one admission to the next
    for wait, ahead in longest_waits(scheduler, coming, 1500):
        assert wait <= (ahead + overtakes + 1) * between


@settings(deadline=None)
@given(coming=arrivals, slots=st.integers(1, 4), overtakes=st.integers(0, 4), quantum=st.integers(1, 9))
def test_a_wait_is_bounded_by_the_quantum_where_answers_never_end(coming, slots, overtakes, quantum):
    scheduler = Scheduler(slots, 99, overtakes, quantum)
    endless = [(after, length, 0, size, -1) for after, length, _, size, _ in coming]
    between = 2 * slots * -(-LONGEST_PROMPT // BUDGET) + quantum + 1
    for wait, ahead in longest_waits(scheduler, endless, 1500):
        assert wait <= (ahead + overtakes + 1) * between


@pytest.mark.parametrize(("sequences", "slots"), [(2, 1), (3, 1), (7, 2), (20, 16)])
def test_endless_sequences_share_slots_by_being_set_aside(sequences, slots):
    scheduler = Scheduler(slots, 99, quantum=5)
    for sequence in range(sequences):
        scheduler.add(sequence, 2)
    drew = [row for _, rows in run(scheduler, 2000) for row in rows]
    share = len(drew) / sequences
    assert all(0.9 * share < drew.count(sequence) < 1.1 * share for sequence in range(sequences))
    if slots == 1:
        assert drew[:12] == [0] * 5 + [1] * 5 + [2 % sequences] * 2


def test_an_urgent_request_sets_a_running_one_aside_at_once():
    scheduler = Scheduler(1, 9, quantum=1000)
    scheduler.add(0, 2, priority=1)
    run(scheduler, 3)
    scheduler.add(1, 2, priority=0)
    step = scheduler.schedule(4)
    assert [move.sequence_id for move in step.set_aside] == [0]
    assert step.rows[0].sequence_id == 1


def test_without_a_quantum_nobody_is_set_aside():
    scheduler = Scheduler(1, 9)
    scheduler.add(0, 2)
    scheduler.add(1, 2, priority=-5)
    run(scheduler, 1)
    scheduler.add(2, 2, priority=-9)
    assert {row for _, rows in run(scheduler, 50) for row in rows} == {1}


def test_idle_rows_between_far_slots_are_closed_up():
    scheduler = Scheduler(8, 9)
    for sequence in range(8):
        scheduler.add(sequence, 2)
    run(scheduler, 20)
    for sequence in range(1, 7):
        scheduler.remove(sequence)
    step = scheduler.schedule(4)
    assert [(move.sequence_id, move.slot) for move in (*step.set_aside, *step.resume)] == [(7, 7), (7, 1)]
    assert [row.slot for row in step.rows] == [0, 1]


@settings(deadline=None)
@given(slots=st.integers(1, 24), data=st.data())
def test_padding_falls_to_one_half_in_as_many_steps_as_there_are_slots(slots, data):
    """Whoever ends; nobody else comes."""
    scheduler = Scheduler(slots, 0)
    for sequence in range(slots):
        scheduler.add(sequence, 1)
    run(scheduler, 2 * slots)
    kept = data.draw(st.sets(st.integers(0, slots - 1), min_size=1))
    for sequence in set(range(slots)) - kept:
        scheduler.remove(sequence)
    for left in reversed(range(slots)):
        step = scheduler.schedule(4)
        scheduler.check_integrity()
        padded = step.rows[-1].slot - step.rows[0].slot + 1
        assert len(step.rows) == len(kept)
        assert left or padded <= 2 * len(kept)
        for row in step.rows:
            scheduler.computed(row)


def test_prompts_that_wait_for_their_turn_cost_a_decode_step_no_rows():
    scheduler = Scheduler(8, 0)
    for sequence in range(8):
        scheduler.add(sequence, 20)
    widths = []
    for _ in range(10):
        step = scheduler.schedule(20)
        if step.kind == "decode":
            widths.append((len(step.rows), step.rows[-1].slot - step.rows[0].slot + 1))
        for row in step.rows:
            scheduler.computed(row)
    assert widths == [(count, count) for count in range(1, 6)]


def test_a_shared_beginning_ends_a_chunk_and_computed_tokens_are_moved_in():
    scheduler = Scheduler(2, 9)
    scheduler.add(0, 10, boundaries=[9])
    first = scheduler.schedule(64).rows[0]
    assert (first.count, first.samples) == (9, False)
    scheduler.computed(first)
    scheduler.add(1, 10, computed=9)
    step = scheduler.schedule(64)
    assert [(move.sequence_id, move.length) for move in step.resume] == [(1, 9)]
    assert step.rows[0].count == 1


def test_the_queue_is_bounded():
    scheduler = Scheduler(1, 2)
    for sequence in range(3):
        assert scheduler.can_add()
        scheduler.add(sequence, 2)
    assert not scheduler.can_add()
    scheduler.schedule(4)
    assert not scheduler.can_add()
    scheduler.remove(0)
    assert scheduler.can_add()


def test_adding_a_sequence_twice_or_without_tokens_is_refused():
    scheduler = Scheduler(1, 2)
    scheduler.add(0, 2)
    with pytest.raises(ValueError, match="here already"):
        scheduler.add(0, 2)
    with pytest.raises(ValueError, match="at least one token"):
        scheduler.add(1, 0)
