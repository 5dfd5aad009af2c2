"""Random operation of the whole cache: book-keeper and real tiers together, on a medium that fails, over restarts."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from python_backends.errors import SessionNotFoundError, TierError
from python_backends.kv.mover import Mover
from python_backends.kv.tiers.limits import DAY_S
from python_backends.runtime.base import KvLayout
from tests.python_backends.kv.caches import MB, open_cache, references
from tests.python_backends.kv.tiers.payloads import payload
from tests.python_backends.kv.tiers.stores import Medium

BLOCK = 4
LAYOUT = KvLayout("made up", "uint8", BLOCK, window=6, global_bytes=700, local_bytes=2000)
SMALL = {"device": 60_000, "host": 80_000, "nvme": MB}
MODELS = ("one", "two")
SALTS = ("", "other")
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=24)


class Checked:
    """In place of a runtime: what is put into a slot must be what was kept under these keys."""

    def __init__(self, keys):
        self.keys = keys

    def import_blocks(self, slot, blocks, tail, length, *, keep):
        assert [bytes(payload(key)) for key in self.keys] == [bytes(each) for each in (*blocks, tail)]
        assert length == self.keys[-1].position
        assert length - 1 <= keep <= length


def leave(cache, tokens, salt="", session="", engine=None):
    """A request of these tokens: look up, load, keep the rest, with a tail at its end. Returns its hit, released.

    ``engine``: lock of whoever loads and keeps, which is one thread's business in a server.
    """
    ids = cache.prompt_ids(tokens, cache_salt=salt)
    hit = cache.look_up(ids, len(ids) - 1)
    over = threading.Event()
    if hit.when_loaded(over.set):
        assert over.wait(30)
    with engine or contextlib.nullcontext():
        load(cache, hit)
        keep(cache, ids, hit, session)
    hit.release()
    return hit


def keep(cache, ids, hit, session):
    layout, visit = cache.layout, cache.touch(hit.match.keys)
    for index in range(len(hit.match.blocks), len(ids) // BLOCK):
        key = ids.block_key(index, layout.block_bytes)
        if not cache.keep(key, functools.partial(fill, key), visit=visit):
            return
    tail = ids.tail_key(len(ids), layout.tail_bytes(len(ids)))
    if cache.keep(tail, functools.partial(fill, tail), visit=visit) and session:
        cache.keep_session(session, tail, None)


def load(cache, hit):
    """Whether what a hit promises could be put into a slot; wrong bytes end the test."""
    return bool(hit.length) and hit.load(Checked(hit.match.keys), 0)


def fill(key, room):
    room[:] = payload(key)


class CacheStates(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.medium = Medium()
        self.now, self.wall = 0.0, 1e9
        self.held = []
        self.model = MODELS[0]
        self.cache = self.open()

    def open(self):
        return open_cache(
            LAYOUT,
            Path(self.folder.name),
            **SMALL,
            fingerprint=self.model,
            clock=lambda: self.now,
            wall=lambda: self.wall,
            open_file=self.medium.open_file,
        )

    @rule(tokens=TOKENS, salt=st.sampled_from(SALTS), session=st.sampled_from(("", "a", "b")))
    def serve(self, tokens, salt, session):
        leave(self.cache, tokens, salt, session)

    @rule(tokens=TOKENS, salt=st.sampled_from(SALTS))
    def hold(self, tokens, salt):
        ids = self.cache.prompt_ids(tokens, cache_salt=salt)
        hit = self.cache.look_up(ids, len(ids))
        load(self.cache, hit)
        self.held.append(hit)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0))
    def release(self, which):
        self.held.pop(which % len(self.held)).release()

    @rule(
        name=st.sampled_from("ab"),
        salt=st.sampled_from(SALTS),
        action=st.sampled_from(("show", "pin", "unpin", "prefetch", "erase")),
    )
    def command(self, name, salt, action):
        try:
            found = self.cache.session(action, name, salt)
        except (SessionNotFoundError, TierError):
            return
        assert found["tokens"] > 0 or action == "erase"

    @rule(seconds=st.sampled_from((0.1, 30.0, 4000.0)))
    def wait(self, seconds):
        self.now += seconds
        self.cache.rebalance()

    @rule(fault=st.sampled_from(("read_error", "write_error", "flip")), count=st.integers(1, 3))
    def fault(self, fault, count):
        setattr(self.medium, fault, count)

    @precondition(lambda self: not self.held)
    @rule(model=st.sampled_from(MODELS), days=st.sampled_from((0, 0, 5, 8, -400)))
    def restart(self, model, days):
        """Maybe with other weights, whose entries are not ours; those of others expire after a week."""
        before = {key.id for key in self.cache._stores["nvme"].entries()}
        self.cache.close()
        for fault in ("read_error", "write_error", "flip"):
            setattr(self.medium, fault, 0)
        same, self.model = self.model == model, model
        self.wall += days * DAY_S
        self.cache = self.open()
        found = {key.id for key in self.cache._stores["nvme"].entries()}
        assert before <= found if same else not before & found

    @invariant()
    def books_and_tiers_agree(self):
        self.cache.check_integrity()
        assert references(self.cache) <= sum(len(hit.match.keys) for hit in self.held)
        for book in self.cache._manager._table.books:
            held = {key.id for key in self.cache._stores[book.tier].entries()}
            said = {entry.key.id for entry in self.cache._manager._table if entry.held & book.bit}
            assert said <= held | {key.id for key in self.cache._stores[book.tier].take_lost()}

    def teardown(self):
        for hit in self.held:
            hit.release()
        assert not references(self.cache)
        self.cache.check_integrity()
        self.cache.close()
        self.folder.cleanup()
        super().teardown()


@pytest.mark.parametrize(
    ("examples", "steps"), [(25, 40), pytest.param(1000, 100, marks=pytest.mark.soak)], ids=["short", "long"]
)
def test_random_operations_over_failing_tiers_and_restarts_keep_books_and_bytes_right(examples, steps):
    case = type("States", (CacheStates,), {}).TestCase
    case.settings = settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    case("runTest").runTest()


@pytest.mark.parametrize("seconds", [4, pytest.param(600, marks=pytest.mark.soak)])
def test_threads_over_tiers_of_a_few_megabytes_move_blocks_all_the_time_and_release_every_reference(tmp_path, seconds):
    layout = KvLayout("made up", "uint8", BLOCK, window=64, global_bytes=4000, local_bytes=2000)
    cache = open_cache(layout, tmp_path, device=MB, host=MB, nvme=16 * MB, mover=Mover)
    end = time.monotonic() + seconds
    faults, hits, engine = [], [0, 0, 0], threading.Lock()

    def work(number):
        draw = np.random.default_rng(number)
        try:
            while time.monotonic() < end:
                # Any of these prompts is a beginning of the longer ones of its number.
                tokens = [int(draw.integers(40))] * int(draw.integers(4, 60))
                hit = leave(cache, tokens, engine=engine)
                hits[number] += hit.length
        except BaseException as error:
            faults.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(hits))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.2)
        with cache.lock:
            cache._manager.check_integrity()
    assert not faults
    assert all(hits)
    assert not references(cache)
    moved = cache.stats()["manager"]["moves"]
    assert all(moved.get(link, 0) > 10 * seconds for link in ("device>host/demote", "host>nvme/demote"))
    assert moved["nvme>host/promote"] > seconds
    cache._mover.close()
    cache.check_integrity()
    cache.close()
