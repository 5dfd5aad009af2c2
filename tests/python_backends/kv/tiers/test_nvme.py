import os
import random
import stat
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from python_backends.errors import ConfigError, EntryLostError, TierFullError, TierIoError, TierLockedError
from python_backends.kv.tiers.segments import MIB, segment_bytes_for
from tests.python_backends.kv.tiers.payloads import entry, payload
from tests.python_backends.kv.tiers.stores import (
    BLOCK,
    FINGERPRINT,
    LIMIT,
    TAIL,
    crash,
    open_store,
    read,
    segments,
    write,
)

SHARED_MEMORY = Path("/dev/shm")


class Operations(RuleBasedStateMachine):
    """Writes, reads, drops, erasures, restarts and crashes in any order, never above what is usable.

    ``held`` must be there; ``dropped`` may come back after a crash; what was erased never does.
    """

    def __init__(self):
        super().__init__()
        # In memory where there is such a place: the medium's speed proves nothing here.
        self.folder = TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
        self.store = open_store(Path(self.folder.name))
        self.held, self.dropped, self.erased = {}, {}, []
        self.count = 0

    @rule(tails=st.integers(0, 3), blocks=st.integers(1, 40))
    def write(self, tails, blocks):
        keys = []
        for kind, num_bytes in [("tail", TAIL)] * tails + [("block", BLOCK)] * blocks:
            self.count += 1
            keys.append(entry(self.count, num_bytes, kind))
        while self.live() + sum(key.num_bytes for key in keys) > self.store.usable_bytes:
            self.drop_one(next(iter(self.held)))
        assert write(self.store, *keys) == [None] * len(keys)
        self.held |= {key.id: key for key in keys}

    def live(self):
        # A record takes a header more than its payload, and small ones up to a page: count as the store must.
        return sum(key.num_bytes for key in self.held.values())

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def write_again(self, data):
        key = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        assert write(self.store, key) == [None]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def read_many(self, data):
        keys = data.draw(st.lists(st.sampled_from(list(self.held.values())), max_size=12))
        rooms = [memoryview(bytearray(key.num_bytes)) for key in keys]
        assert self.store.read_many(list(zip(keys, rooms, strict=True))) == [None] * len(keys)
        assert all(found == payload(key) for key, found in zip(keys, rooms, strict=True))

    def drop_one(self, name):
        key = self.held.pop(name)
        self.dropped[name] = key
        self.store.drop(key)
        assert read(self.store, key) == "missing"

    @precondition(lambda self: self.held)
    @rule(data=st.data(), number=st.integers(1, 30))
    def drop(self, data, number):
        for _ in range(min(number, len(self.held))):
            self.drop_one(data.draw(st.sampled_from(sorted(self.held))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def erase(self, data):
        names = set(data.draw(st.lists(st.sampled_from(sorted(self.held)), max_size=5)))
        self.store.erase([self.held[name] for name in names])
        # Erasing waits for everything dropped so far as well.
        self.erased += [self.held.pop(name) for name in names] + list(self.dropped.values())
        self.dropped = {}
        files = [path.read_bytes() for path in segments(Path(self.folder.name))]
        for key in self.erased[-20:]:
            assert not any(payload(key)[:40] in content or key.id in content for content in files)

    @rule(killed=st.booleans())
    def restart(self, killed):
        if killed:
            crash(self.store)
        else:
            self.store.close()
            self.erased += self.dropped.values()
            self.dropped = {}
        self.store = open_store(Path(self.folder.name))
        back = {key.id: key for key in self.store.entries()}
        assert back.items() <= (self.held | self.dropped).items()
        assert self.held.items() <= back.items()
        for name in list(back):
            if name in self.dropped:
                self.store.drop(self.dropped[name])

    @invariant()
    def books_agree(self):
        self.store.check_integrity()
        assert {key.id for key in self.store.entries()} == set(self.held)
        assert self.store.take_lost() == []
        assert sum(path.stat().st_size for path in segments(Path(self.folder.name))) <= LIMIT

    def teardown(self):
        self.store.close()
        self.folder.cleanup()


TestOperations = Operations.TestCase
TestOperations.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


def test_an_entry_survives_a_restart_with_all_of_its_identity(tmp_path):
    store = open_store(tmp_path)
    keys = [entry(1, BLOCK), entry(2, TAIL, "tail", parent=1, salt=b"s" * 32), entry(3, 4096), entry(4, 1)]
    assert write(store, *keys) == [None] * 4
    store.close()
    store = open_store(tmp_path)
    assert list(store.entries()) == keys
    assert [read(store, key) for key in keys] == [True] * 4
    other = entry(1, BLOCK, salt=b"t" * 32)
    assert read(store, other) == "identity"
    store.close()


def test_files_are_for_their_owner_alone(tmp_path):
    folder = tmp_path / "cache"
    store = open_store(folder, write_budget_bytes=10 * MIB)
    write(store, entry(1, BLOCK))
    store.close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert {path.suffix for path in folder.iterdir()} == {"", ".json", ".segment"}


def test_a_second_server_is_refused_with_the_first_ones_process_id(tmp_path):
    first = open_store(tmp_path)
    with pytest.raises(TierLockedError, match=f"process {os.getpid()}.*folder of its own"):
        open_store(tmp_path)
    first.close()
    open_store(tmp_path).close()


def test_entries_of_another_model_are_not_seen_and_go_when_room_is_needed_or_they_expire(tmp_path):
    now = 1e9
    store = open_store(tmp_path, wall=lambda: now)
    old = entry(1, BLOCK)
    write(store, old)
    store.close()
    store = open_store(tmp_path, fingerprint=b"x" * 32, wall=lambda: now)
    assert list(store.entries()) == []
    assert len(segments(tmp_path)) == 1
    store.close()
    store = open_store(tmp_path, wall=lambda: now)
    assert read(store, old) is True
    store.close()
    # Within the limit they stay; a jump of the clock back or an hour on changes nothing.
    for at in (now - 1e8, now + 3600):
        store = open_store(tmp_path, fingerprint=b"x" * 32, wall=lambda at=at: at)
        assert len(segments(tmp_path)) == 1
        store.close()
    store = open_store(tmp_path, fingerprint=b"x" * 32, wall=lambda: now)
    number = 10
    while segments(tmp_path)[0].name.startswith("0" * 16):
        assert write(store, entry(number, TAIL, "tail")) == [None]
        number += 1
    assert number > 30  # it was needed: the limit is reached
    store.close()
    store = open_store(tmp_path, fingerprint=b"y" * 32, wall=lambda: now + 8 * 86_400)
    assert segments(tmp_path) == []
    assert store.stats().failures["expired"] > 3
    store.close()


def test_a_smaller_limit_removes_the_oldest_files(tmp_path):
    store = open_store(tmp_path)
    keys = [entry(number, TAIL, "tail") for number in range(25)]
    write(store, *keys)
    store.close()
    store = open_store(tmp_path, LIMIT // 2)
    store.check_integrity()
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= LIMIT // 2
    held = list(store.entries())
    assert held == keys[-len(held) :]
    while store.stats().live_bytes > store.usable_bytes:
        store.drop(held.pop(0))
    assert write(store, entry(100, TAIL, "tail")) == [None]
    assert all(read(store, key) is True for key in held)
    store.close()


def test_collection_keeps_what_is_live_at_a_bounded_cost(tmp_path):
    """Random replacement at the usable size, the worst case for a log: all is kept, and copies are counted."""
    draw = random.Random(1)
    store = open_store(tmp_path)
    held = []
    for number in range(1500):
        key = entry(number, *((TAIL, "tail") if draw.random() < 0.05 else (BLOCK, "block")))
        while sum(k.num_bytes for k in held) + key.num_bytes > store.usable_bytes:
            store.drop(held.pop(draw.randrange(len(held))))
        assert write(store, key) == [None]
        held.append(key)
    assert all(read(store, key) is True for key in held)
    stats = store.stats()
    assert stats.details["collections"] > 10
    assert stats.details["copied_bytes"] < 3 * stats.written_bytes * 8192 / BLOCK
    store.check_integrity()
    store.close()


def test_more_than_fits_is_refused_and_nothing_held_is_lost(tmp_path):
    store = open_store(tmp_path)
    keys = [entry(number, TAIL, "tail") for number in range(100)]
    results = write(store, *keys)
    held = [key for key, result in zip(keys, results, strict=True) if result is None]
    refused = [result for result in results if result is not None]
    assert len(held) * TAIL >= store.usable_bytes
    assert {(type(error), error.reason) for error in refused} == {(TierFullError, "room")}
    assert all(read(store, key) is True for key in held)
    store.close()


def test_a_closed_store_says_so(tmp_path):
    store = open_store(tmp_path)
    write(store, entry(1, BLOCK))
    store.close()
    with pytest.raises(TierIoError, match="closed"):
        store.write(entry(2, BLOCK), memoryview(bytes(BLOCK)))
    with pytest.raises(EntryLostError, match="closed"):
        store.read(entry(1, BLOCK), memoryview(bytearray(BLOCK)))


def test_sizes_of_segments():
    assert segment_bytes_for(100 * 2**30, 2**19) == 64 * MIB
    assert segment_bytes_for(100 * 2**30, 22 * MIB) > 350 * MIB
    assert segment_bytes_for(2**30, 22 * MIB) * 8 <= 2**30
    with pytest.raises(ConfigError, match="turn it off"):
        segment_bytes_for(200 * MIB, 22 * MIB)


def test_direct_io_and_buffered_io_read_each_others_files(tmp_path, monkeypatch):
    key = entry(1, TAIL, "tail")
    store = open_store(tmp_path)
    write(store, key)
    store.close()
    monkeypatch.setattr("python_backends.kv.tiers.nvme.probe_direct_io", lambda folder: False)
    store = open_store(tmp_path, fingerprint=FINGERPRINT)
    assert not store.direct
    assert read(store, key) is True
    assert write(store, entry(2, BLOCK)) == [None]
    store.close()
    monkeypatch.undo()
    store = open_store(tmp_path)
    assert read(store, entry(2, BLOCK)) is True
    store.close()
