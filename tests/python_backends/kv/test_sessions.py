"""Sessions by name: what a conversation left is shown, kept, brought up and erased, also by the next server."""

from __future__ import annotations

import errno
import json
import time

import pytest

from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.errors import InvalidParameterError, SessionNotFoundError, TierIoError
from python_backends.kv import session_commands
from python_backends.kv.mover import Mover
from python_backends.kv.sessions import Sessions
from tests.checkpoints import tiny
from tests.driver import decoder
from tests.python_backends.decoder.callers import Caller, prompt, word_tokenizer
from tests.python_backends.kv.caches import MB, demote, open_cache, references

SMALL = {"device": MB // 2, "host": MB // 2, "nvme": 16 * MB}


@pytest.fixture
def serve(tmp_path):
    engines = []

    def open_(**sizes):
        for engine in engines:
            engine.close()
        engines.clear()
        runtime = decoder(tiny("1b"), num_slots=2, context=512, block_tokens=16)
        cache = open_cache(runtime.kv_layout, tmp_path, **sizes)
        engines.append(Engine(runtime, word_tokenizer(), Config(prefill_chunk=32), cache=cache))
        return engines[0], cache

    yield open_
    for engine in engines:
        engine.cache.check_integrity()
        assert not references(engine.cache)
        engine.close()


def ask(engine, ids, session="", salt="", **parameters):
    caller = Caller(ids, **parameters)
    caller.request.session, caller.request.cache_salt = session, salt
    caller.to(engine).wait()
    while not engine.idle:
        time.sleep(0.001)
    return caller


def cached(caller):
    return sum(caller.last.usage.as_json()["cached_tokens"].values())


def test_a_session_is_what_its_newest_request_left(serve):
    engine, cache = serve()
    first = ask(engine, prompt(1, 50), "chat")
    assert cache.session("show", "chat")["tokens"] == 50 + 7
    ask(engine, [*prompt(1, 50), *first.tokens, 5, 6], "chat")
    found = cache.session("show", "chat")
    assert (found["tokens"], found["pinned"]) == (50 + 8 + 2 + 7, False)
    assert found["bytes"]["device"] > 0
    with pytest.raises(SessionNotFoundError):
        cache.session("show", "chat", cache_salt="other")
    with pytest.raises(SessionNotFoundError):
        cache.session("erase", "other")
    with pytest.raises(InvalidParameterError, match="show, pin"):
        cache.session("burn", "chat")


def test_a_pinned_session_outlives_a_flood_and_a_restart(serve):
    engine, cache = serve(**SMALL)
    ids = prompt(2, 60)
    kept = ask(engine, ids, "mine", salt="me")
    assert cache.session("pin", "mine", "me")["pinned"]
    follow = [*ids, *kept.tokens, 7, 8]
    for seed in range(40):
        ask(engine, prompt(100 + seed, 60))
    assert cached(ask(engine, follow, "mine", salt="me")) == 67
    engine, cache = serve(**SMALL)
    found = cache.session("show", "mine", "me")
    assert found["pinned"]
    assert found["bytes"]["nvme"] > 0
    assert cached(ask(engine, follow, salt="me")) >= 67
    assert cache.session("unpin", "mine", "me")["pinned"] is False
    for seed in range(40):
        ask(engine, prompt(200 + seed, 60))
    assert not any(entry.pins for entry in cache._manager._table)


def test_an_erased_session_is_gone_and_what_it_shared_stays(serve):
    engine, cache = serve()
    system = prompt(3, 48)
    ask(engine, system)
    mine, yours = [*system, *prompt(4, 40)], [*system, *prompt(5, 40)]
    ask(engine, mine, "mine")
    ask(engine, yours, "yours")
    cache.session("pin", "mine")
    cache.session("erase", "mine")
    with pytest.raises(SessionNotFoundError):
        cache.session("show", "mine")
    assert cached(ask(engine, mine)) == 48
    assert cached(ask(engine, yours)) == 87
    engine, cache = serve()
    with pytest.raises(SessionNotFoundError):
        cache.session("show", "mine")


def test_prefetch_brings_a_session_into_memory(serve):
    engine, cache = serve()
    ask(engine, prompt(6, 60), "chat")
    entries = sorted(
        (entry.key for entry in cache._manager._table), key=lambda key: (-key.position, key.kind != "tail")
    )
    for source, target in (("device", "host"), ("host", "nvme")):
        demote(cache, tuple(entries), source, target)
    before = cache.session("prefetch", "chat")["bytes"]
    after = cache.session("show", "chat")["bytes"]
    assert before["host"] == 0
    assert after["host"] == after["nvme"] == before["nvme"]


@pytest.mark.parametrize("mover", [None, Mover], ids=["at-once", "threads"])
def test_a_saved_session_goes_on_after_a_restart_and_is_restored_into_memory(serve, mover):
    engine, cache = serve(mover=mover)
    ids = prompt(8, 100)
    first = ask(engine, ids, "chat")
    saved = cache.session("save", "chat")
    assert saved["bytes"]["nvme"] == saved["bytes"]["device"] > 0
    assert any(key.position == 100 and key.kind == "tail" for key in cache._stores["nvme"].entries())
    assert not saved["pinned"]
    engine, cache = serve(mover=mover)
    found = cache.session("restore", "chat")
    assert found["tokens"] == 107
    assert found["bytes"]["host"] == found["bytes"]["nvme"] == saved["bytes"]["nvme"]
    follow = ask(engine, [*ids, *first.tokens, 5], "chat")
    assert follow.last.usage.as_json()["cached_tokens"]["host"] == 107


def test_what_cannot_be_saved_is_said(serve, tmp_path, monkeypatch):
    engine, cache = serve()
    ask(engine, prompt(9, 60), "chat")
    monkeypatch.setattr(session_commands, "STALLED_S", 0.1)
    monkeypatch.setattr(cache._stores["nvme"]._log, "append", failing_append)
    with pytest.raises(TierIoError, match="could not be saved"):
        cache.session("save", "chat")
    assert cached(ask(engine, prompt(9, 60))) == 59


def failing_append(_):
    raise OSError(errno.EIO, "the disk is gone")


def test_a_salt_takes_no_more_than_its_quota_of_any_tier(serve):
    engine, cache = serve(quota=MB // 4)
    others = ask(engine, prompt(1, 60))
    for seed in range(30):
        ask(engine, prompt(300 + seed, 60), "greedy", salt="greedy")
        cache.session("pin", "greedy", "greedy")
    for book in cache._manager._table.books:
        assert all(used <= MB // 4 for used in book.by_salt.values())
    assert cached(ask(engine, [*prompt(1, 60), *others.tokens, 5])) == 67


def test_names_are_not_written_and_a_broken_file_costs_the_names_alone(serve, tmp_path):
    engine, cache = serve()
    ask(engine, prompt(7, 40), "my secret name")
    cache.session("pin", "my secret name")
    path = tmp_path / "sessions.json"
    assert "secret" not in path.read_text(encoding="utf-8")
    assert path.stat().st_mode & 0o777 == 0o600
    for text in ("{", "[]", '{"a": {"tip": {}, "wanted": 1}}', json.dumps({"a": 5})):
        path.write_text(text, encoding="utf-8")
        engine, cache = serve()
        with pytest.raises(SessionNotFoundError):
            cache.session("show", "my secret name")
        assert len(ask(engine, prompt(7, 40)).tokens) == 8


def test_the_same_name_under_two_salts_is_two_sessions():
    assert Sessions.name_of("a", b"x" * 32) != Sessions.name_of("a", b"y" * 32)
    assert Sessions.name_of("a", b"x" * 32) == Sessions.name_of("a", b"x" * 32)
