"""The learned model of reuse, and what is decided by it."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from python_backends.kv.admission import DAY_S, WorthWriting
from python_backends.kv.blocks import EntryKey
from python_backends.kv.costs import LinkSpeeds
from python_backends.kv.policies.a2cr import A2CR
from python_backends.kv.policies.base import BlockStats
from python_backends.kv.policies.guard import Guard
from python_backends.kv.policies.hazards import BINS, EDGES, Hazards, age_bin, gittins, pack_entry, pack_visit
from python_backends.kv.policies.reuse import FIRST_FIT, ReuseModel


def key(name: int, position: int = 64, num_bytes: int = 1) -> EntryKey:
    return EntryKey(name.to_bytes(32, "big"), "block", bytes(32), position, num_bytes, bytes(32))


def entry(model: ReuseModel, name: int, now: float, position: int = 64) -> BlockStats:
    made = BlockStats(key(name, position), model.open_visit(now))
    model.add(made)
    return made


def test_before_anything_is_learned_the_order_is_that_of_lru() -> None:
    index = gittins(Hazards().of([pack_entry(0, 1, 0) | pack_visit(1, 512, 512, 0)]))[0]
    assert np.all(np.diff(index) < 0), "the longer ago, the less worth"


def test_the_index_of_a_constant_hazard_is_that_hazard() -> None:
    assert gittins(np.full(BINS, 0.02)) == pytest.approx(np.full(BINS, 0.02), rel=1e-6)


def test_the_index_rises_towards_a_hazard_that_lies_ahead() -> None:
    hazard = np.full(BINS, 1e-6)
    peak = age_bin(100.0)
    hazard[peak] = 0.05
    index = gittins(hazard)
    assert np.all(np.diff(index[: peak + 1]) > 0)
    assert index[peak] == pytest.approx(0.05, rel=1e-3)
    assert index[peak + 1] < 1e-5


def test_it_learns_when_entries_come_back() -> None:
    """Even names come back after 60 s, odd ones never; they differ in how much their visit added."""
    model = ReuseModel()
    now, waiting = 0.0, []
    for name in range(4 * FIRST_FIT):
        now += 5.0
        made = entry(model, name, now, position=64 if name % 2 else 4096)
        if name % 2 == 0:
            waiting.append((now + 60.0, made))
        while waiting and waiting[0][0] <= now:
            at, back = waiting.pop(0)
            model.move(back, model.open_visit(at), at)
        model.check_integrity()
    model.fit(now)
    good, bad = entry(model, 10_000, now, position=4096), entry(model, 10_001, now, position=64)
    assert model.probability(good, now, 240.0) > 0.6
    assert model.probability(bad, now, 240.0) < 0.1
    policy = A2CR(model)
    assert policy.worth(good, now + 30.0) > 10 * policy.worth(bad, now + 30.0)
    assert policy.worth(good, now + 30.0) > policy.worth(good, now + 300.0), "its time has passed"


def test_probability_agrees_with_the_hazard_within_a_bin() -> None:
    model = ReuseModel()
    made = entry(model, 1, 0.0)
    hazard = model.hazard(made)[age_bin(100.0)]
    assert model.probability(made, 100.0, 1.0) == pytest.approx(1 - np.exp(-hazard), rel=1e-6)
    assert EDGES[age_bin(100.0)] <= 100.0 < EDGES[age_bin(100.0) + 1]


def test_attention_is_evidence_that_fades_and_is_neutral_where_there_is_none() -> None:
    model = ReuseModel()
    policy = A2CR(model, decay_factor=0.1, attention_weight=0.5)
    made = entry(model, 1, 0.0)
    neutral = [policy.worth(made, at) for at in (1.0, 60.0)]
    made.mass = 1.0
    assert [policy.worth(made, at) for at in (1.0, 60.0)] == pytest.approx(neutral)
    made.mass = 4.0
    attended = [policy.worth(made, at) / plain for at, plain in zip((1.0, 60.0), neutral, strict=True)]
    assert attended[0] > 1.5
    assert 1.0 < attended[1] < 1.01
    made.mass = 0.25
    assert policy.worth(made, 1.0) < neutral[0]


def test_the_rank_is_the_worth_whatever_was_ranked_before() -> None:
    model = ReuseModel()
    policy = A2CR(model, attention_weight=0.5)
    first, second = entry(model, 1, 0.0), entry(model, 2, 3.0)
    deeper = BlockStats(key(3, 128), first.visit)
    model.add(deeper)
    for mass in (None, 4.0, 0.5):
        first.mass = mass
        for now in (5.0, 5.0, 80.0):
            for one in (first, first, second, deeper, first):
                assert policy.rank(one, now) == (policy.worth(one, now), -one.key.position)


def test_worth_counts_the_cost_of_computing_and_the_bytes() -> None:
    model = ReuseModel()
    policy = A2CR(model)
    made = entry(model, 1, 0.0)
    made.recompute_s = 1.0
    once = policy.worth(made, 5.0)
    made.recompute_s = 3.0
    assert policy.worth(made, 5.0) == pytest.approx(3 * once)
    made.key = key(1, num_bytes=2)
    assert policy.worth(made, 5.0) == pytest.approx(1.5 * once)


def test_the_write_budget_is_kept_and_spent_on_what_is_likely() -> None:
    model = ReuseModel()
    budget = WorthWriting(model, LinkSpeeds(), bytes_per_day=DAY_S / 4)  # 2,160 bytes at once, a quarter a second
    rng = np.random.default_rng(0)
    admitted = {True: 0, False: 0}
    for second in range(0, 10_000):
        fresh = bool(rng.random() < 0.5)
        visit = ReuseModel().open_visit(float(second) - (1.0 if fresh else 600.0))
        made = BlockStats(key(second), visit)
        admitted[fresh] += budget.admits(made, float(second))
    assert sum(admitted.values()) <= 10_000 / 4 + DAY_S / 40
    assert admitted[True] > admitted[False], "before learning the newer is the likelier"
    assert budget.refused == 10_000 - sum(admitted.values())


def test_what_saves_less_time_than_its_write_takes_is_not_written() -> None:
    model = ReuseModel()
    admission = WorthWriting(model, LinkSpeeds({("host", "nvme"): 1000.0, ("nvme", "host"): 2000.0}))
    made = BlockStats(key(1, num_bytes=1000), model.open_visit(0.0), recompute_s=10.0)
    likely = model.probability(made, 1.0, 6 * 3600.0)
    assert likely > 0.2, "before anything is learned reuse is not unlikely"
    assert admission.admits(made, 1.0)
    made.recompute_s = 0.5  # as long as loading it
    assert not admission.admits(made, 1.0)
    made.recompute_s = 0.5 + 0.9 / likely
    assert not admission.admits(made, 1.0)
    made.recompute_s = 0.5 + 1.1 / likely
    assert admission.admits(made, 1.0)
    assert admission.refused == 2


def uses(model: ReuseModel, made: BlockStats, now: float, *, held: bool) -> None:
    model.move(made, model.open_visit(now), now, held=held)


def test_the_guard_knows_what_lru_would_hold() -> None:
    """Room for three: of four entries used in turn LRU never holds the next one."""
    guard = Guard(3)
    model = ReuseModel(guard)
    entries = [entry(model, name, float(name)) for name in range(4)]
    for name in range(4, 100):
        uses(model, entries[name % 4], float(name), held=False)
    assert guard.trusted, "LRU found nothing either"
    for name in range(100, 200):
        uses(model, entries[name % 2], float(name), held=name % 4 == 0)
    assert not guard.trusted, "LRU would have found all of them, the cache found half"


def test_the_guard_lets_the_model_try_again_and_the_order_is_by_use_until_then() -> None:
    guard = Guard(4)
    model = ReuseModel(guard)
    policy = A2CR(model, attention_weight=0.5)
    entries = [entry(model, name, float(name)) for name in range(2)]
    count = 2
    while guard.trusted:
        uses(model, entries[count % 2], float(count), held=False)
        count += 1
    assert count < 60
    for one in entries:
        policy.on_insert(one, float(count))
    entries[0].mass, entries[1].mass = 16.0, None
    with closing(policy.victims(float(count))) as victims:
        oldest = min(entries, key=lambda one: one.visit.time)
        assert next(victims) is oldest, "whatever attention says"
    for later in range(count, 2 * count + 2):
        model.open_visit(float(later))
    assert guard.trusted
