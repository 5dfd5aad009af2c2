import random
import threading
import time
from concurrent.futures import CancelledError, wait

import pytest

from python_backends.errors import EntryLostError, InternalError, TierError, TierFullError, TierIoError
from python_backends.kv.blocks import Move
from python_backends.kv.mover import Mover
from python_backends.kv.tiers.arena import Arena
from tests.python_backends.kv.tiers.payloads import entry
from tests.python_backends.kv.tiers.stores import BLOCK, TAIL, Medium, open_store, read, write


class Tiers:
    """Three real tiers, the lowest on a medium that may hang."""

    def __init__(self, folder, **options):
        self.medium = Medium()
        self.stores = {
            "device": Arena("device", 400_000, alignment=64),
            "host": Arena("host", 400_000, alignment=64),
            "nvme": open_store(folder, open_file=self.medium.open_file),
        }
        self.mover = Mover(self.stores, **options)

    def submit(self, key, source, target, **options):
        return self.mover.submit(Move(key, source, target, "demote"), **options)

    def close(self):
        self.medium.hang.set()
        self.mover.close()
        for store in self.stores.values():
            store.close()


def wait_until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def tiers(tmp_path):
    found = Tiers(tmp_path)
    yield found
    found.close()


def test_entries_travel_down_and_up_again_unchanged(tiers):
    keys = [entry(number, *((TAIL, "tail") if number % 5 == 0 else (BLOCK, "block"))) for number in range(20)]
    assert write(tiers.stores["device"], *keys) == [None] * 20
    for source, target in (("device", "host"), ("host", "nvme"), ("nvme", "device")):
        if target == "device":
            for key in keys:
                tiers.stores["device"].drop(key)
        futures = [tiers.submit(key, source, target) for key in keys]
        assert [future.result(10) for future in futures] == [None] * 20
    assert all(read(tiers.stores["device"], key) is True for key in keys)
    found = tiers.mover.stats()
    assert {name: lane["moves"] for name, lane in found["lanes"].items()} == {"read": 20, "write": 20, "memory": 20}
    assert found["bytes_per_s"].keys() == {"device→host", "host→nvme", "nvme→device"}


def test_failures_come_typed_and_one_of_a_batch_spoils_no_other(tiers):
    keys = [entry(number, BLOCK) for number in range(6)]
    write(tiers.stores["host"], *keys[:3])
    futures = [tiers.submit(key, "host", "nvme") for key in keys]
    wait(futures, 10)
    assert [future.exception() is None for future in futures] == [True] * 3 + [False] * 3
    assert {future.exception().reason for future in futures[3:]} == {"missing"}
    write(tiers.stores["device"], *(entry(100 + number, TAIL, "tail") for number in range(10)))
    full = tiers.submit(keys[0], "nvme", "device")
    assert isinstance(full.exception(10), TierFullError)
    assert read(tiers.stores["nvme"], keys[0]) is True
    with pytest.raises(InternalError):
        tiers.mover.submit(Move(keys[0], "host", None, "drop"))


def test_a_read_that_hangs_is_a_miss_at_its_deadline_and_others_go_on(tiers):
    keys = [entry(number, BLOCK) for number in range(4)]
    write(tiers.stores["nvme"], *keys)
    tiers.medium.hang.clear()
    began = time.monotonic()
    stuck = tiers.submit(keys[0], "nvme", "host", deadline_s=0.3)
    assert tiers.medium.hung.acquire(timeout=5)
    error = stuck.exception(5)
    assert 0.25 < time.monotonic() - began < 2
    assert isinstance(error, EntryLostError)
    assert error.reason == "late"
    # Its room stays taken while the thread may still write there, but the key may be filled anew.
    taken = tiers.stores["host"].stats().used_bytes
    assert taken >= BLOCK
    assert not tiers.stores["host"].contains(keys[0])
    write(tiers.stores["host"], keys[0])
    # Copies in memory and writes go their way, and so do reads once the medium answers again.
    assert tiers.submit(keys[0], "host", "device").result(5) is None
    assert tiers.mover.stats()["lanes"]["read"]["stuck"] == 1
    time.sleep(0.5)
    tiers.medium.hang.set()
    wait_until(lambda: tiers.mover.stats()["lanes"]["read"]["stuck"] == 0)
    assert "nvme→host" not in tiers.mover.speeds.as_dict(), "no bandwidth is learnt from it"
    assert tiers.submit(keys[1], "nvme", "host", deadline_s=5).result(5) is None
    assert all(read(tiers.stores["host"], key) is True for key in keys[:2])
    tiers.stores["host"].check_integrity()
    assert tiers.stores["host"].stats().used_bytes == 2 * 3008


def test_a_medium_that_hangs_for_good_stops_at_a_few_threads_and_refuses_at_once(tmp_path):
    tiers = Tiers(tmp_path, most_stuck=2, readers=1)
    keys = [entry(number, BLOCK) for number in range(8)]
    write(tiers.stores["nvme"], *keys)
    tiers.medium.hang.clear()
    before = threading.active_count()
    for number, key in enumerate(keys[:3]):  # of a priority each, so that none joins another's batch
        tiers.submit(key, "nvme", "host", deadline_s=0.2 * (number + 1), priority=number)
    for _ in range(3):
        assert tiers.medium.hung.acquire(timeout=5)
    wait_until(lambda: tiers.mover.stats()["lanes"]["read"]["stuck"] == 3)
    began = time.monotonic()
    error = tiers.submit(keys[3], "nvme", "host", deadline_s=60).exception(5)
    assert (type(error), error.reason) == (TierIoError, "hung")
    assert time.monotonic() - began < 1
    assert threading.active_count() <= before + 2
    tiers.medium.hang.set()
    wait_until(lambda: tiers.mover.stats()["lanes"]["read"]["stuck"] == 0)
    assert tiers.submit(keys[4], "nvme", "host").result(5) is None
    tiers.close()


def test_urgent_moves_go_first_waiting_ones_can_be_cancelled_and_a_full_queue_refuses_the_last(tmp_path):
    tiers = Tiers(tmp_path, queue_limit=4, readers=1)
    keys = [entry(number, BLOCK) for number in range(8)]
    write(tiers.stores["nvme"], *keys)
    tiers.medium.hang.clear()
    first = tiers.submit(keys[0], "nvme", "host")
    assert tiers.medium.hung.acquire(timeout=5)
    order = []
    waiting = {}
    for number, priority in ((1, 5), (2, 5), (3, 1), (4, 0)):
        waiting[number] = tiers.submit(keys[number], "nvme", "host", priority=priority)
        waiting[number].add_done_callback(lambda _, number=number: order.append(number))
    idle = tiers.submit(keys[5], "nvme", "host", priority=9)
    assert (type(idle.exception(1)), idle.exception().reason) == (TierFullError, "queue")
    assert waiting[1].cancel()
    tiers.medium.hang.set()
    assert first.result(5) is None
    wait(list(waiting.values()), 5)
    assert order == [1, 4, 3, 2]
    with pytest.raises(CancelledError):
        waiting[1].result()
    assert not tiers.stores["host"].contains(keys[1])
    tiers.close()


def test_close_ends_what_waits_and_later_moves_are_refused(tmp_path):
    tiers = Tiers(tmp_path, readers=1)
    keys = [entry(number, BLOCK) for number in range(4)]
    write(tiers.stores["nvme"], *keys)
    tiers.medium.hang.clear()
    first = tiers.submit(keys[0], "nvme", "host")
    assert tiers.medium.hung.acquire(timeout=5)
    waiting = tiers.submit(keys[1], "nvme", "host", priority=3)
    threading.Timer(0.2, tiers.medium.hang.set).start()
    tiers.mover.close()
    assert first.result(0) is None
    assert waiting.exception(0).reason == "closed"
    assert tiers.submit(keys[2], "nvme", "host").exception(0).reason == "closed"
    tiers.close()


def test_random_moves_with_failing_reads_never_give_wrong_bytes(tiers):
    draw = random.Random(3)
    keys = [entry(number, BLOCK) for number in range(60)]
    write(tiers.stores["host"], *keys)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        futures = []
        for key in draw.sample(keys, 12):
            source = draw.choice(["host", "nvme", "device"])
            target = draw.choice([tier for tier in ("host", "nvme", "device") if tier != source])
            if tiers.stores[source].contains(key) and not tiers.stores[target].contains(key):
                futures.append(tiers.submit(key, source, target))
        if draw.random() < 0.1:
            tiers.medium.read_error = 1
        wait(futures, 10)
        assert all(future.exception() is None or isinstance(future.exception(), TierError) for future in futures)
        for store in tiers.stores.values():
            for key in draw.sample(keys, 4):
                if draw.random() < 0.3:
                    store.drop(key)
    for store in tiers.stores.values():
        store.check_integrity()
        tiers.medium.read_error = 0
        assert all(read(store, key) in (True, "paused") for key in store.entries())
