"""The scheduler alone: random arrivals, ends and steps, with every invariant checked after each."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from python_backends.decoder.scheduler import Scheduler

SLOTS, QUEUE, IMAGE, OVERTAKES, QUANTUM, ASIDE = 3, 6, 5, 2, 4, 60


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
        self.scheduler = Scheduler(SLOTS, QUEUE, OVERTAKES, QUANTUM, ASIDE)
        self.next_id = 0
        self.done = {}  # tokens computed
        self.prompt = {}
        self.slots = {}  # slot → sequence whose cache is in it
        self.aside = {}  # sequence → length
        self.spans, self.cuts = {}, {}
        self.held = set()
        self.suspended = set()
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
            self.suspended.discard(chosen)
            self.slots = {slot: each for slot, each in self.slots.items() if each != chosen}
            self.done[chosen] = 0
            self.held.add(chosen)

    @rule(slot=st.integers(0, SLOTS - 1), further=st.integers(1, 20))
    def advance(self, slot, further):
        """What a prompt lacked is put behind what it has computed."""
        chosen = self.slots.get(slot)
        at = self.done.get(chosen, 0) + further
        if not any(a < at < b for a, b in self.spans.get(chosen, [(-1, at + 1)])) and at < self.prompt[chosen]:
            self.scheduler.advance(chosen, at)
            self.done[chosen] = at

    @rule(data=st.data())
    def suspend(self, data):
        """What was moved into its slot is still on its way."""
        running = [each for each in self.scheduler.running if self.done[each] < self.prompt[each]]
        if running:
            chosen = data.draw(st.sampled_from(running))
            self.scheduler.suspend(chosen)
            self.suspended.add(chosen)

    @precondition(lambda self: self.suspended)
    @rule(data=st.data())
    def enter(self, data):
        chosen = data.draw(st.sampled_from(sorted(self.suspended)))
        self.scheduler.enter(chosen)
        self.suspended.discard(chosen)

    @rule(data=st.data())
    def remove(self, data):
        known = sorted(self.done)
        if known:
            chosen = data.draw(st.sampled_from(known))
            self.scheduler.remove(chosen)
            for kept in (self.done, self.prompt, self.aside, self.waited):
                kept.pop(chosen, None)
            self.held.discard(chosen)
            if data.draw(st.booleans()):  # else what was on its way arrives when the sequence has gone
                self.suspended.discard(chosen)
            self.slots = {slot: each for slot, each in self.slots.items() if each != chosen}

    @rule(budget=st.integers(1, 12), accepted=st.integers(1, 3))
    def step(self, budget, accepted):
        before = set(self.scheduler.running)
        step = self.scheduler.schedule(budget)
        idle = not set(self.scheduler.running) - self.suspended
        assert (step is None) == idle, "there is work exactly when a sequence has a slot, and its cache in it"
        assert not set(self.done) - self.held or self.scheduler.running, "a sequence that could run has no slot"
        assert not self.held & set(self.scheduler.running), "a sequence on hold has a slot"
        if step is None:
            return
        self.follow_moves(step)
        self.count_overtakes(before, step)
        assert [row.slot for row in step.rows] == sorted({row.slot for row in step.rows})
        assert all(row.count for row in step.rows), "every row does something"
        for row in step.rows:
            assert row.sequence_id not in self.suspended
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
