"""What of one prompt the cache holds, from the look-up until it is in a slot or given up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from python_backends.errors import EntryLostError, InternalError
from python_backends.kv.blocks import TIERS, EntryId, EntryKey, Match, Tier
from python_backends.kv.costs import Piece, choose
from python_backends.kv.identity import PromptIds
from python_backends.runtime.base import DecoderRuntime

if TYPE_CHECKING:
    from python_backends.kv.cache import KvCache

TRIES = 3
"""Beginnings of a prompt that are loaded, one after another, where the one before was lost."""


class Hit:
    """What of a prompt the cache holds, kept where it is until `release`. Made by `KvCache.look_up`."""

    def __init__(self, cache: KvCache, ids: PromptIds, limit: int, token_s: float) -> None:
        self.ids = ids
        self.cache = cache
        self._limit = limit
        self._token_s = token_s
        self._match: Match | None = None
        self._held: tuple[EntryKey, ...] = ()
        self._came_from: dict[EntryId, Tier] = {}
        """Where each entry was when it was first found: loading moves it."""
        self._loading = False
        self._released = False
        self._tries = TRIES
        self._then: Callable[[], None] = lambda: None

    def find(self) -> None:
        """Look it up; once, by the cache."""
        # A tail one token further serves as well: its window reaches far enough back (`DecoderRuntime.import_blocks`).
        further = self.ids.can_resume_at(self._limit) and self._limit < len(self.ids)
        self._try(self._limit + further)

    def _try(self, limit: int) -> None:
        """Match at most ``limit`` tokens and have loaded what of them is not in memory."""
        cache = self.cache
        with cache.lock:
            match, cold = self._hold(0 if self._released else limit)
            while cold and not self._worth_loading(match, cold):
                match, cold = self._hold(match.length - 1)
            was_loading, self._loading = self._loading, bool(cold)
            then = self._then
        if cold:
            cache.prefetch(cold, self._loaded)
        elif was_loading:
            then()

    def _hold(self, limit: int) -> tuple[Match, list[EntryKey]]:
        """Hold the longest match of at most ``limit`` tokens instead of the one before; (it, what is not in memory)."""
        self.cache.release(self._held)
        self._match = match = self.cache.match(self.ids, limit)
        self._held = match.keys
        tiers = [*match.block_tiers, *([] if match.tail_tier is None else [match.tail_tier])]
        for key, tier in zip(match.keys, tiers, strict=True):
            self._came_from.setdefault(key.id, tier)
        return match, [key for key in match.keys if not self.cache.in_memory(key)]

    def _worth_loading(self, match: Match, cold: list[EntryKey]) -> bool:
        """Whether it is no more than is to be loaded, and expected to end before computing would."""
        cache, speeds = self.cache, self.cache.speeds
        if cache.prefetch_tokens is not None and len(cold) * cache.layout.block_tokens > cache.prefetch_tokens:
            return False
        if speeds is None or not self._token_s or match.tail is None:
            return True
        slow = {key.id for key in cold}
        link: tuple[Tier, Tier] = ("nvme", cache.load_target)
        *blocks, tail = [Piece(key.num_bytes, (link,) if key.id in slow else ()) for key in match.keys]
        plan = choose(
            blocks,
            tail,
            tokens=match.length,
            block_tokens=cache.layout.block_tokens,
            tokens_per_s=1 / self._token_s,
            speeds=speeds,
        )
        return plan.load_s <= plan.recompute_s

    def _loaded(self) -> None:
        """Loads are over. Where something did not come, the longest beginning without it is tried."""
        with self.cache.lock:
            complete = self._released or all(self.cache.in_memory(key) for key in self.match.keys)
            self._loading = self._loading and not complete
            then = self._then
        if complete:
            then()
        else:
            self._tries -= 1
            self._try(self.match.length - 1 if self._tries else 0)

    @property
    def match(self) -> Match:
        """What was found."""
        assert self._match is not None
        return self._match

    @property
    def length(self) -> int:
        """Tokens that need not be computed."""
        return min(self.match.length, self._limit)

    @property
    def missed(self) -> str:
        """Why it is not more; "" where it is all but what must be computed."""
        return "" if self.match.length >= self._limit else self.match.missed

    @property
    def loading(self) -> bool:
        """Whether a part of it is on its way into memory; `length` may shrink until that is over."""
        return self._loading

    def when_loaded(self, then: Callable[[], None]) -> bool:
        """Have ``then`` called, from another thread, when nothing is on its way any more; False: that is so now."""
        with self.cache.lock:
            if self._loading:
                self._then = then
            return self._loading

    @property
    def tokens_by_tier(self) -> dict[str, int]:
        """How many of the `length` tokens came from each tier."""
        found: dict[str, int] = dict.fromkeys(TIERS, 0)
        end = 0
        for key in self.match.keys:
            found[self._came_from[key.id]] += max(0, min(key.position, self.length) - end)
            end = key.position
        return found

    def load(self, runtime: DecoderRuntime, slot: int) -> bool:
        """Put the tokens into a slot; False where an entry was lost, and nothing of the slot may be used."""
        match = self.match
        if match.tail is None or self._loading:
            raise InternalError("nothing was found, or it is not in memory yet")
        with contextlib.ExitStack() as stack:
            try:
                views = [stack.enter_context(self.cache.view(key)) for key in match.keys]
            except EntryLostError:
                return False
            runtime.import_blocks(slot, views[:-1], views[-1], match.length, keep=self.length)
        return True

    def release(self) -> None:
        """Let go of it. May be called again."""
        with self.cache.lock:
            self._released = True
            self.cache.release(self._held)
            self._held = ()
