"""Engines with a KV cache of a few megabytes, for the tests of what the two do together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.kv.blocks import EntryKey, Tier
from python_backends.kv.cache import KvCache
from tests.checkpoints import tiny
from tests.driver import decoder
from tests.python_backends.decoder.callers import Caller, word_tokenizer
from tests.python_backends.kv.caches import demote, open_cache, references

BLOCK, CONTEXT = 16, 512
PLAIN = Config(prefill_chunk=24, max_draft=0, quantum_tokens=0)
Open = Callable[..., tuple[Engine, Any]]


@contextmanager
def engines(place: Path) -> Iterator[Open]:
    """Opens engines (and their caches, with tiers on disk below ``place``); in the end every reference is released."""
    opened: list[Engine] = []
    tokenizer = word_tokenizer()

    def open_(
        family: str = "1b",
        config: Config = PLAIN,
        slots: int = 4,
        cached: bool = True,
        folder: str | None = None,
        **sizes: Any,
    ) -> tuple[Engine, KvCache | None]:
        runtime = decoder(tiny(family), num_slots=slots, context=CONTEXT, block_tokens=BLOCK)
        cache = open_cache(runtime.kv_layout, folder and place / folder, **sizes) if cached else None
        opened.append(Engine(runtime, tokenizer, config, cache=cache))
        return opened[-1], cache

    yield open_
    for engine in (each for each in opened if not each._closing):
        settle(engine)
        engine.check_integrity()
        if engine.cache is not None:
            assert not references(engine.cache), "a reference was not released"
            engine.cache.check_integrity()
        engine.close()


def settle(engine: Engine) -> None:
    """Wait until no request is here."""
    deadline = time.monotonic() + 10
    while not engine.idle and time.monotonic() < deadline:
        time.sleep(0.001)


def send_down(engine: Engine, cache: KvCache, *tiers: Tier) -> None:
    """Move every entry from the device to each of these tiers in turn."""
    settle(engine)
    source: Tier = "device"
    for target in tiers:
        demote(cache, keys_of(cache), source, target)
        source = target


def keys_of(cache: KvCache) -> tuple[EntryKey, ...]:
    """Every entry, children first."""
    return tuple(
        sorted((entry.key for entry in cache._manager._table), key=lambda key: (-key.position, key.kind != "tail"))
    )


def cached(caller: Caller, tier: Tier = "device") -> int:
    found: int = caller.last.usage.as_json()["cached_tokens"][tier]
    return found


def missed(caller: Caller) -> str:
    found: str = caller.last.usage.as_json()["cache_miss"]
    return found


class Gate:
    """A transfer that is over when the test says so, though the bytes are there already."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def done(self) -> bool:
        return self.opened.is_set()

    def wait(self) -> None:
        assert self.opened.wait(30)


def load_behind_a_gate(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """What a runtime does whose copies go on beside its steps."""
    gate, load = Gate(), engine._runtime.import_blocks

    def import_blocks(*args: Any, **options: Any) -> Gate:
        load(*args, **options)
        return gate

    monkeypatch.setattr(engine._runtime, "import_blocks", import_blocks)
    return gate


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
