"""Entries whose payload comes beside the steps: announced at once, seen when they are there."""

from __future__ import annotations

import threading

import pytest

from python_backends.errors import InternalError
from python_backends.kv.mover import Mover
from python_backends.runtime.base import KvLayout
from tests.python_backends.kv.caches import open_cache, references

WAIT_S = 30
LAYOUT = KvLayout("made up", "uint8", 4, window=6, global_bytes=700, local_bytes=100)
TOKENS = list(range(8))


class Gate:
    """A transfer that ends when the test says so."""

    def __init__(self, room=None, value=0, error=None):
        self.room, self.value, self.error = room, value, error
        self.opened = threading.Event()

    def done(self):
        return self.opened.is_set()

    def wait(self):
        assert self.opened.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        if self.room is not None:
            self.room[:] = bytes([self.value]) * len(self.room)


@pytest.fixture(params=[None, Mover])
def cache(request):
    opened = open_cache(LAYOUT, device=20_000, host=40_000, mover=request.param)
    yield opened
    opened.check_integrity()
    opened.close()


def keys_of(cache):
    """Two blocks and the tail behind them."""
    ids = cache.prompt_ids(TOKENS)
    return [*(ids.block_key(index, LAYOUT.block_bytes) for index in range(2)), ids.tail_key(8, LAYOUT.tail_bytes(8))]


def begin(cache, key, value=1, error=None):
    """Keep an entry; the gate behind which its payload waits."""
    gates = []

    def export(room):
        gates.append(Gate(room, value, error))
        return gates[-1]

    assert cache.keep(key, export)
    return gates[0]


def in_background(run):
    found = []
    thread = threading.Thread(target=lambda: found.append(run()), daemon=True)
    thread.start()
    return thread, found


def test_a_look_up_waits_for_what_is_on_its_way(cache):
    keys = keys_of(cache)
    gates = [begin(cache, key, value) for value, key in enumerate(keys)]
    thread, found = in_background(lambda: cache.look_up(cache.prompt_ids(TOKENS), 8))
    for key, gate in zip(keys, gates, strict=True):
        assert not cache.in_memory(key)
        thread.join(0.05)
        assert thread.is_alive(), "it did not wait"
        gate.opened.set()
    thread.join(WAIT_S)
    assert found[0].length == 8
    for value, key in enumerate(keys):
        with cache.view(key) as payload:
            assert bytes(payload) == bytes([value]) * key.num_bytes
    found[0].release()


def test_what_never_comes_is_not_held_and_may_be_kept_again(cache):
    first, *rest = keys_of(cache)
    begin(cache, first, error=InternalError("the driver's")).opened.set()
    assert cache.look_up(cache.prompt_ids(TOKENS), 8).length == 0
    assert not cache.in_memory(first)
    assert cache.held_blocks(cache.prompt_ids(TOKENS)) == 0
    cache.check_integrity()
    for key in (first, *rest):
        begin(cache, key).opened.set()
    hit = cache.look_up(cache.prompt_ids(TOKENS), 8)
    assert hit.length == 8
    hit.release()


def test_what_must_leave_for_another_is_waited_for_first():
    """No entry leaves half written, and none stays that nobody knows."""
    cache = open_cache(LAYOUT, device=8_000, host=40_000)  # two blocks
    keys = [cache.prompt_ids([n, *range(7)]).block_key(0, LAYOUT.block_bytes) for n in range(6)]
    gates = [begin(cache, key, 7) for key in keys[:2]]
    thread, found = in_background(lambda: [cache.keep(key, lambda room: None) for key in keys[2:]])
    thread.join(0.1)
    assert thread.is_alive(), "it did not wait"
    for gate in gates:
        gate.opened.set()
    thread.join(WAIT_S)
    assert found == [[True] * 4]
    assert all(cache.in_memory(key) for key in keys)
    with cache.view(keys[0]) as payload:
        assert bytes(payload) == bytes([7]) * LAYOUT.block_bytes
    cache.check_integrity()
    cache.close()


def test_entries_stay_where_they_are_until_they_are_in_a_slot(cache):
    for key in keys_of(cache):
        begin(cache, key).opened.set()
    hit = cache.look_up(cache.prompt_ids(TOKENS), 8)
    gate = Gate()

    class Runtime:
        def import_blocks(self, slot, blocks, tail, length, *, keep, computed):
            return gate

    def pinned():
        return sum(tier["details"].get("pinned", 0) for tier in cache.stats()["tiers"].values())

    assert hit.load(Runtime(), 0)
    assert hit.transfer is gate
    hit.release()
    assert not references(cache)
    assert pinned() == 3
    over = threading.Event()
    cache.after(gate, over.set)
    gate.opened.set()
    assert over.wait(WAIT_S)
    assert pinned() == 0
