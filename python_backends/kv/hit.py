"""What of one prompt the cache holds, from the look-up until it is in a slot or given up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from python_backends.errors import EntryLostError, InternalError
from python_backends.kv.blocks import TIERS, EntryId, EntryKey, Match, Tier
from python_backends.kv.costs import Piece, choose
from python_backends.kv.identity import PromptIds
from python_backends.runtime.base import DecoderRuntime, Transfer

if TYPE_CHECKING:
    from python_backends.kv.cache import KvCache

TRIES = 3
"""Beginnings of a prompt that are loaded, one after another, where the one before was lost."""


class Hit:
    """What of a prompt the cache holds, kept where it is until `release`. Made by `KvCache.look_up`.

    Where ``beside``, its request may compute from the front while the rest is loaded (`meets_at`).
    """

    def __init__(self, cache: KvCache, ids: PromptIds, limit: int, token_s: float, *, beside: bool) -> None:
        self.ids = ids
        self.cache = cache
        self._limit = limit
        self._token_s = token_s
        self._beside = beside
        self.meets_at = 0
        """Tokens that the request is to compute itself meanwhile, from the first on: only what lies behind them is
        being loaded. 0: everything is."""
        self.computed = 0
        """Tokens that it had computed when the others were put behind them."""
        self._match: Match | None = None
        self._held: tuple[EntryKey, ...] = ()
        self._came_from: dict[EntryId, Tier] = {}
        """Where each entry was when it was first found: loading moves it."""
        self._loading = False
        self._released = False
        self._tries = TRIES
        self._then: Callable[[], None] = lambda: None
        self.transfer: Transfer | None = None
        """What `load` began; None: nothing that goes on by itself."""

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
            wanted: list[EntryKey] | None = []
            while cold and (wanted := self._worth_loading(match, cold)) is None:
                match, cold = self._hold(match.length - 1)
            cold = wanted or []
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
        self.meets_at = 0
        tiers = [*match.block_tiers, *([] if match.tail_tier is None else [match.tail_tier])]
        for key, tier in zip(match.keys, tiers, strict=True):
            self._came_from.setdefault(key.id, tier)
        return match, [key for key in match.keys if not self.cache.in_memory(key)]

    def _worth_loading(self, match: Match, cold: list[EntryKey]) -> list[EntryKey] | None:
        """What of ``cold`` to load: all of it, or what lies behind `meets_at`; None where it is more than is to be
        loaded, or expected to take longer than computing."""
        cache, speeds = self.cache, self.cache.speeds
        if cache.prefetch_tokens is not None and len(cold) * cache.layout.block_tokens > cache.prefetch_tokens:
            return None
        if speeds is None or not self._token_s or match.tail is None:
            return cold
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
        meets_at = plan.computed_blocks * cache.layout.block_tokens
        # Images in what is held are not encoded, and others delay the request.
        if plan.way == "both" and self._beside and meets_at < self.length and not self.ids.images:
            self.meets_at = meets_at
            return [key for key in cold if key.position > meets_at]
        return cold if plan.load_s <= plan.recompute_s else None

    def _loaded(self) -> None:
        """Loads are over. Where something did not come, the longest beginning without it is tried."""
        with self.cache.lock:
            complete = self._released or all(self.cache.in_memory(key) for key in self._keys_behind(self.meets_at))
            self._loading = self._loading and not complete
            then = self._then
        if complete:
            then()
        else:
            # Who computes meanwhile cannot begin anew with another beginning; who waits goes on waiting.
            self._tries = 0 if self.meets_at else self._tries - 1
            self._beside = False
            self._try(self.match.length - 1 if self._tries else 0)

    def _keys_behind(self, computed: int) -> tuple[EntryKey, ...]:
        """What a slot with so many tokens lacks."""
        return self.match.keys[computed // self.cache.layout.block_tokens :]

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
        if self.match.length < self._limit:
            return self.match.missed
        return "slow" if self.computed else ""

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
        end = self.computed
        for key in self.match.keys:
            found[self._came_from[key.id]] += max(0, min(key.position, self.length) - end)
            end = max(end, key.position)
        return found

    def meeting(self, computed: int) -> Literal["later", "now", "never"]:
        """Of what is loaded with ``computed`` tokens of the request: when it can be put behind them."""
        with self.cache.lock:
            if computed >= self.length:
                return "never"
            return "later" if self._loading or computed < self.meets_at else "now"

    def load(self, runtime: DecoderRuntime, slot: int, computed: int = 0) -> bool:
        """Put the tokens into a slot, behind those ``computed`` there; False where an entry was lost, and nothing was
        changed.

        With True they may still be on their way (`transfer`); entries stay where they are until then.
        """
        match = self.match
        if match.tail is None or self._loading:
            raise InternalError("nothing was found, or it is not in memory yet")
        with contextlib.ExitStack() as stack:
            try:
                views = [stack.enter_context(self.cache.view(key)) for key in self._keys_behind(computed)]
            except EntryLostError:
                return False
            self.transfer = runtime.import_blocks(
                slot, views[:-1], views[-1], match.length, keep=self.length, computed=computed
            )
            if self.transfer is not None:
                self.cache.after(self.transfer, stack.pop_all().close)
        self.computed = computed
        return True

    def release(self) -> None:
        """Let go of it. May be called again."""
        with self.cache.lock:
            self._released = True
            self.cache.release(self._held)
            self._held = ()
