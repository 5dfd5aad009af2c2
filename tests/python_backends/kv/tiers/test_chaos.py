"""Whatever happens to process, files or disk: right bytes or a typed miss, counted, and a store that goes on."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from python_backends.errors import EntryLostError, TierFullError, TierIoError
from python_backends.kv.tiers.limits import DAY_S, Breaker, WriteBudget
from python_backends.kv.tiers.records import PAGE
from python_backends.kv.tiers.segments import MIB
from tests.paths import ROOT
from tests.python_backends.kv.tiers.payloads import entry
from tests.python_backends.kv.tiers.stores import (
    BLOCK,
    TAIL,
    DiedError,
    Medium,
    crash,
    numbered,
    open_store,
    read,
    segments,
    write,
)

KEYS = [numbered(number) for number in range(12, 22)]


@pytest.mark.parametrize("rounds", [8, pytest.param(200, marks=pytest.mark.soak)])
def test_kill_at_random_moments_loses_nothing_that_was_acknowledged_and_brings_nothing_erased_back(tmp_path, rounds):
    draw = random.Random(rounds)
    held, dropped, first, total = set(), set(), 0, 0
    for number in range(rounds):
        command = [
            sys.executable,
            "-m",
            "tests.python_backends.kv.tiers.writer",
            str(tmp_path),
            str(first),
            str(number),
        ]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        child.stdin.write(" ".join(map(str, sorted(held))) + "\n")
        child.stdin.flush()
        assert child.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0, 0.4))
        child.kill()
        said = child.stdout.read()
        child.communicate()
        maybe = set()
        for line in said.splitlines(keepends=True):
            what, *names = line.split()
            names = {int(name) for name in names} if line.endswith("\n") else set()
            total += len(names)
            held |= names if what == "w" else set()
            held -= names if what != "w" else set()
            dropped |= names if what in ("d", "e?") else set()
            dropped -= names if what == "e" else set()
            maybe = names
        store = open_store(tmp_path)
        store.check_integrity()
        back = {key.id for key in store.entries()}
        read_back = {name: read(store, numbered(name)) for name in held}
        assert set(read_back.values()) <= {True}, (said[-300:], {n: r for n, r in read_back.items() if r is not True})
        last = max([first, *held, *maybe]) + 30
        may_be = held | dropped | set(range(first, last))  # a write that was cut off may have arrived
        assert back <= {numbered(name).id for name in may_be}
        for name in may_be - held:
            assert read(store, numbered(name)) in (True, "missing")
            store.drop(numbered(name))
        first = last
        dropped = set()
        store.close()
    assert total > 50 * rounds


@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.soak)])
def test_dying_in_any_of_the_writes_loses_nothing_that_was_acknowledged(tmp_path, stride):
    """Appends, headers of dropped records and collection alike; the write in question arrives but for its end."""
    everything = range(1, 400)
    collections = 0
    for last_write in range(2, 1000, stride):
        folder = tmp_path / str(last_write)
        medium = Medium()
        medium.writes_left = last_write
        held, draw = [], random.Random(7)
        try:
            store = open_store(folder, open_file=medium.open_file)
            for number in everything:
                held += [numbered(number)] if write(store, numbered(number)) == [None] else []
                while sum(key.num_bytes for key in held) > store.usable_bytes - TAIL:
                    store.drop(held.pop(draw.randrange(len(held))))
        except DiedError:
            crash(store)
        else:
            store.close()
            shutil.rmtree(folder)
            break
        collections = max(collections, store.stats().details["collections"])
        store = open_store(folder)
        store.check_integrity()
        assert {read(store, key) for key in held} <= {True}, last_write
        assert write(store, *KEYS[:3]) == [None] * 3
        store.close()
        shutil.rmtree(folder)
    assert collections > 5


def test_a_file_truncated_at_any_length_gives_right_entries_or_misses(tmp_path):
    whole = tmp_path / "whole"
    store = open_store(whole)
    write(store, *KEYS)
    crash(store)
    (path,) = segments(whole)
    size = store.stats().used_bytes
    written = sum(PAGE + -(-key.num_bytes // PAGE) * PAGE for key in KEYS) + PAGE
    lengths = [0, 1, *(n + d for n in range(PAGE, written + 1, PAGE) for d in (-PAGE // 2, -1, 0)), written, size]
    found = set()
    for length in lengths:
        folder = tmp_path / "cut"
        shutil.copytree(whole, folder)
        os.truncate(folder / path.name, length)
        store = open_store(folder)
        store.check_integrity()
        results = [read(store, key) for key in KEYS]
        assert set(results) <= {True, "missing"}
        # The log is in order, so what is there is a beginning of what was written.
        assert results == sorted(results, key=lambda result: result is not True)
        found.add(results.count(True))
        assert write(store, *KEYS) == [None] * len(KEYS)
        assert [read(store, key) for key in KEYS] == [True] * len(KEYS)
        store.close()
        shutil.rmtree(folder)
    assert found == set(range(len(KEYS) + 1))


def test_a_file_truncated_under_a_running_server_is_a_miss_by_name(tmp_path):
    store = open_store(tmp_path)
    write(store, *KEYS)
    os.truncate(segments(tmp_path)[0], 3 * PAGE)
    assert [read(store, key) for key in KEYS] == [True] + ["short"] * (len(KEYS) - 1)
    assert store.stats().failures["short"] == len(KEYS) - 1
    assert write(store, *KEYS) == [None] * len(KEYS)
    store.check_integrity()
    store.close()


def test_any_flipped_bit_costs_at_most_its_own_record(tmp_path):
    whole = tmp_path / "whole"
    store = open_store(whole)
    write(store, *KEYS)
    store.close()
    (path,) = segments(whole)
    content = bytearray(path.read_bytes())
    places = [*range(60), *range(PAGE, PAGE + 280), *range(2 * PAGE, 2 * PAGE + BLOCK, 97)]
    places += random.Random(0).sample(range(PAGE, len(content)), 60)
    worst = set()
    for place in places:
        folder = tmp_path / "flipped"
        folder.mkdir()
        content[place] ^= 1 << place % 8
        (folder / path.name).write_bytes(content)
        content[place] ^= 1 << place % 8
        store = open_store(folder)
        store.check_integrity()
        results = [read(store, key) for key in KEYS]
        if place < PAGE:
            assert set(results) in ({True}, {"missing"})
        else:
            assert results.count(True) >= len(KEYS) - 1
            worst |= {result for result in results if result is not True}
        if results.count(True) < len(KEYS):
            assert store.stats().failures
        store.close()
        shutil.rmtree(folder)
    assert worst == {"missing", "checksum"}


def test_bits_that_flip_in_the_read_itself_are_found(tmp_path):
    medium = Medium()
    store = open_store(tmp_path, open_file=medium.open_file)
    key = entry(1, 2 * PAGE)
    write(store, key)
    medium.flip = 1
    assert read(store, key) == "checksum"
    assert read(store, key) == "missing"
    assert store.stats().failures == {"checksum": 1, "missing": 1}
    store.close()


def test_reads_that_fail_take_their_own_entry_and_after_several_the_tier_rests_and_comes_back(tmp_path):
    medium, now = Medium(), [100.0]
    store = open_store(tmp_path, open_file=medium.open_file, breaker=Breaker(3, 10.0, clock=lambda: now[0]))
    write(store, *KEYS)
    medium.read_error = 1
    assert read(store, KEYS[0]) == "io"
    assert read(store, KEYS[1]) is True
    medium.read_error = 3
    assert [read(store, key) for key in KEYS[1:6]] == ["io", "io", "io", "paused", "paused"]
    with pytest.raises(TierIoError, match="rests"):
        store.write(entry(99, BLOCK), memoryview(bytes(BLOCK)))
    assert store.contains(KEYS[4])
    now[0] += 10.1
    assert [read(store, key) for key in KEYS[4:]] == [True] * len(KEYS[4:])
    assert store.stats().failures == {"io": 4, "paused": 3}
    store.close()


def test_one_bad_sector_in_a_read_of_many_costs_one_entry(tmp_path):
    medium = Medium()
    store = open_store(tmp_path, open_file=medium.open_file)
    write(store, *KEYS)
    rooms = [memoryview(bytearray(key.num_bytes)) for key in KEYS]
    medium.read_error = 2  # the read of all, then the first one's alone
    results = store.read_many(list(zip(KEYS, rooms, strict=True)))
    assert [isinstance(result, EntryLostError) for result in results] == [True] + [False] * (len(KEYS) - 1)
    store.close()


def test_a_write_that_breaks_off_is_not_held_and_the_next_goes_elsewhere(tmp_path):
    medium = Medium()
    store = open_store(tmp_path, open_file=medium.open_file)
    write(store, *KEYS[:3])
    medium.write_error = 1
    results = write(store, *KEYS[3:6])
    assert {(type(result), result.reason) for result in results} == {(TierIoError, "io")}
    assert write(store, *KEYS[3:8]) == [None] * 5
    store.check_integrity()
    for _ in range(2):
        assert [read(store, key) for key in KEYS] == [True] * 8 + ["missing"] * 2
        crash(store)
        store = open_store(tmp_path)
    store.close()


def test_an_erasure_that_the_file_refuses_removes_the_file(tmp_path):
    medium = Medium()
    store = open_store(tmp_path, open_file=medium.open_file)
    write(store, *KEYS)
    medium.write_error = 1
    store.erase(KEYS[:1])
    assert segments(tmp_path) == []
    assert set(store.take_lost()) == set(KEYS[1:])
    assert write(store, *KEYS) == [None] * len(KEYS)
    store.check_integrity()
    store.close()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill_up(path, most_bytes=2**40):
    """Write until nothing goes any more; returns the bytes."""
    with open(path, "wb", buffering=0) as file:
        for done in range(0, most_bytes, PAGE):
            try:
                file.write(bytes(PAGE))
            except OSError:
                return done
    return most_bytes


def test_a_full_disk_is_a_typed_refusal_and_what_was_held_stays(tiny_disk):
    store = open_store(tiny_disk / "cache", 32 * MIB)
    assert store.limit_bytes <= 4 * MIB
    fill_up(tiny_disk / "other", 2 * MIB)
    keys = [entry(number, TAIL, "tail") for number in range(60)]
    results = write(store, *keys)
    held = [key for key, result in zip(keys, results, strict=True) if result is None]
    refused = {(type(result), result.reason) for result in results if result is not None}
    assert refused == {(TierFullError, "disk")}
    assert len(held) * TAIL > MIB
    assert all(read(store, key) is True for key in held)
    store.check_integrity()
    for key in held[1:]:
        store.drop(key)
    assert write(store, entry(999, TAIL, "tail")) == [None]
    store.close()
    # A disk that is full before the server starts.
    assert fill_up(tiny_disk / "more") < 3 * MIB
    store = open_store(tiny_disk / "cache", 32 * MIB, write_budget_bytes=MIB)
    assert read(store, entry(999, TAIL, "tail")) is True
    refused = [result for result in write(store, *keys) if result is not None]
    assert {result.reason for result in refused} == {"disk"}
    assert read(store, entry(999, TAIL, "tail")) is True
    store.close()


def test_room_below_the_floor_is_left_to_others(tmp_path):
    store = open_store(tmp_path, free_floor_bytes=2**60)
    with pytest.raises(TierFullError, match="floor"):
        store.write(entry(1, BLOCK), memoryview(bytes(BLOCK)))
    assert segments(tmp_path) == []
    store.close()


@pytest.fixture
def permitted():
    """A folder that every user may enter; pytest's own are for one alone."""
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


WITHOUT_PERMISSION = """
import os, sys
from pathlib import Path
from tests.python_backends.kv.tiers.stores import numbered, open_store, read, write
from python_backends.kv.tiers.limits import Breaker
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
folder = Path(sys.argv[1])
store = open_store(folder, breaker=Breaker(2, 0.0))
keys = [numbered(number) for number in range(100)]
assert write(store, *keys[:10]) == [None] * 10
folder.chmod(0)
refused = [result for result in write(store, *keys[10:]) if result is not None]
assert {(type(r).__name__, r.reason) for r in refused} == {("TierIoError", "io")}, refused
assert all(read(store, key) is True for key in keys[:10])
folder.chmod(0o700)
assert write(store, *keys[50:60]) == [None] * 10
store.check_integrity()
for path in folder.glob("*.segment"):
    path.chmod(0)
store.close()
store = open_store(folder)
assert list(store.entries()) == [] and store.stats().failures["io"] > 0
assert write(store, *keys[:10]) == [None] * 10
store.close()
"""


def test_permissions_taken_away_are_misses_and_writes_work_again_once_they_are_back(permitted):
    folder = permitted / "cache"
    folder.mkdir(mode=0o700)
    if os.getuid() == 0:
        os.chown(folder, 65534, 65534)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PERMISSION, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_write_budget_fills_evenly_and_no_jump_of_the_clock_fills_it_sooner(tmp_path):
    clock, wall, path = [0.0], [1e9], tmp_path / "budget.json"

    def open_budget():
        return WriteBudget(1000, path, lambda: clock[0], lambda: wall[0])

    budget = open_budget()
    assert budget.spend(1000)
    assert not budget.spend(1)
    for jump in (1e8, -2e8, 5e9):
        wall[0] += jump
        assert not budget.spend(1)
    clock[0] += DAY_S / 10
    assert budget.left_bytes == 100
    budget.save()
    for jump, left in ((-1e6, 100), (1e6, 100), (DAY_S / 10, 200), (1e12, 1000)):
        wall[0] += jump
        assert open_budget().left_bytes == left
    path.write_text("{not json")
    assert open_budget().left_bytes == 1000


def test_a_spent_budget_refuses_writes_and_not_reads(tmp_path):
    now = [0.0]
    store = open_store(tmp_path, write_budget_bytes=20 * 2 * PAGE, clock=lambda: now[0], breaker=Breaker())
    keys = [entry(number, BLOCK) for number in range(30)]
    results = [write(store, key)[0] for key in keys]
    assert results[:20] == [None] * 20
    assert {result.reason for result in results[20:]} == {"budget"}
    assert all(read(store, key) is True for key in keys[:20])
    now[0] += DAY_S / 4
    assert [write(store, key)[0] for key in keys[20:25]] == [None] * 5
    assert write(store, keys[25])[0].reason == "budget"
    store.close()
