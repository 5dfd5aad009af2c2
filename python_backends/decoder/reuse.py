"""What a sequence takes from the KV cache and what it leaves there.

Blocks are kept as they fill. Tails (what resuming at one position needs of the sliding window, megabytes each) are
kept where a later prompt is likely to part from this one: at the end of the prompt and of the answer, behind the last
images, and where a look-up found blocks further than any tail (another prompt parted here before). Chunks are cut so
that the computation stops there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from python_backends.decoder.sequence import ActiveSequence, CachedTokens, Request
from python_backends.kv import identity
from python_backends.kv.blocks import EntryKey
from python_backends.kv.cache import KvCache
from python_backends.kv.hit import Hit
from python_backends.kv.identity import ImageSpan, PromptIds
from python_backends.runtime.base import DecoderRuntime, Float32

if TYPE_CHECKING:
    from python_backends.kv.policies.base import Visit

IMAGE_TAILS = 4
"""Images of a prompt, the last ones, behind which a tail is kept: a tail weighs as much as thousands of tokens."""
OBSERVE_EVERY = 32
"""Steps between two looks at where a sequence's attention goes."""


Load = Literal["there", "coming", "lost"]


@dataclass
class Reused:
    """One sequence and the cache. Made with its request's `Hit`; touched by the engine's thread alone."""

    ids: PromptIds
    """Of the tokens computed so far, and at first of the whole prompt."""
    hit: Hit | None
    """Until its tokens are in the slot, or given up."""
    tails: set[int]
    """Positions within the prompt where a tail is wanted."""
    kept: int = 0
    """Blocks that the cache was given, or gave."""
    prompt_tail: EntryKey | None = None
    """Of the tail at the prompt's end, once it is kept."""
    visit: Visit | None = None
    """What the cache counts as one use."""


class Reuse:
    """The engine's side of the cache. Without one every call does nothing.

    Args:
        cache: or None.
        runtime: whose slots are read and filled.
        token_seconds: what a prompt token takes to compute, as far as is known.
        idle: whether a prompt that comes now is computed at once and beside nothing else.
        watches_attention: whether the cache is told where attention goes.
    """

    def __init__(
        self,
        cache: KvCache | None,
        runtime: DecoderRuntime,
        token_seconds: Callable[[], float],
        idle: Callable[[], bool],
        *,
        watches_attention: bool,
    ) -> None:
        self._cache = cache
        self._runtime = runtime
        self._image_tokens = runtime.spec.tokens_per_image
        self._token_seconds = token_seconds
        self._idle = idle
        self._watches_attention = watches_attention
        self.block_tokens = runtime.kv_layout.block_tokens

    def look_up(self, request: Request) -> Hit | None:
        """What the cache holds of a prompt; from any thread, before its images are encoded."""
        if self._cache is None:
            return None
        ids = self._cache.prompt_ids(request.input_ids, self._images(request), request.cache_salt)
        limit = 0 if request.parameters.prompt_logprobs is not None else self._last_start(ids)
        return self._cache.look_up(ids, limit, self._token_seconds(), beside=self._idle())

    def _last_start(self, ids: PromptIds) -> int:
        """Where the last chunk of a prompt may begin: its last token must be computed, and by the kernels of any other
        (`batch.filler`)."""
        alone = self._runtime.spec.wants_even_chunks and not self._runtime.max_draft(len(ids) - 1, 1)
        return len(ids) - 2 if alone and ids.can_resume_at(len(ids) - 2) else len(ids) - 1

    def begin(self, sequence: ActiveSequence, hit: Hit | None) -> None:
        """Before the sequence is queued. ``hit`` is its own from now on; None for one that starts elsewhere."""
        if self._cache is None:
            return
        request = sequence.request
        if hit is None:
            ids = self._cache.prompt_ids(request.input_ids, self._images(request), request.cache_salt)
            sequence.reused = Reused(ids, None, set())
            sequence.cached = CachedTokens({}, "shared")
            return
        visit = self._cache.touch(hit.match.keys) if hit.meets_at else None
        sequence.reused = Reused(hit.ids, hit, self._tails(request, hit), visit=visit)

    def boundaries(self, sequence: ActiveSequence) -> Sequence[int]:
        """Positions that chunks should end at."""
        return tuple(sequence.reused.tails) if sequence.reused else ()

    def found(self, sequence: ActiveSequence) -> int:
        """Loads are over: how many tokens `load` can put into a slot."""
        reused = sequence.reused
        if reused is None or reused.hit is None:
            return 0
        length = reused.hit.length
        if not length:
            self.give_up(sequence)
        return length

    def meets(self, sequence: ActiveSequence, computed: int) -> int:
        """How many tokens the slot of a sequence that computes while the rest is loaded (`Hit.meets_at`) has once
        `load` puts that behind those ``computed``; 0: it is not there yet, or of no use any more."""
        reused = sequence.reused
        if reused is None or (hit := reused.hit) is None or (when := hit.meeting(computed)) == "later":
            return 0
        if when == "never":
            self.give_up(sequence, "slow" if hit.length else "lost")
            return 0
        return hit.length

    def load(self, sequence: ActiveSequence, slot: int, entered: Callable[[], None], computed: int = 0) -> Load:
        """Put what was found into the slot, behind the tokens ``computed`` there. Where it is "coming", ``entered`` is
        called from another thread when it is there; where it was "lost", all that lies further must be computed."""
        reused = sequence.reused
        assert self._cache is not None
        assert reused is not None
        assert reused.hit is not None
        hit, reused.hit = reused.hit, None
        loaded = hit.load(self._runtime, slot, computed)
        if loaded:
            reused.kept = len(hit.match.blocks)
        sequence.cached = CachedTokens(hit.tokens_by_tier, hit.missed) if loaded else CachedTokens({}, "lost")
        self._cache.count(sequence.cached.by_tier, sequence.prompt_length, sequence.cached.missed)
        reused.visit = reused.visit or self._cache.touch(hit.match.keys if loaded else ())
        hit.release()
        if hit.transfer is not None:
            self._cache.after(hit.transfer, entered)
            return "coming"
        return "there" if loaded else "lost"

    def give_up(self, sequence: ActiveSequence, missed: str | None = None) -> None:
        """Nothing will be loaded (any more); ``missed``: why, where the look-up does not know it."""
        if sequence.reused is not None and sequence.reused.hit is not None:
            hit, sequence.reused.hit = sequence.reused.hit, None
            sequence.cached = CachedTokens({}, hit.missed if missed is None else missed)
            hit.cache.count({}, sequence.prompt_length, sequence.cached.missed)
            sequence.reused.visit = sequence.reused.visit or hit.cache.touch(())
            hit.release()

    def computed(self, sequence: ActiveSequence, slot: int, length: int) -> None:
        """``length`` tokens of the sequence are in its slot: keep the blocks that are full, and a tail where wanted."""
        reused = sequence.reused
        if self._cache is None or reused is None:
            return
        reused.ids.extend(sequence.tokens[len(reused.ids) : length])
        self._keep_blocks(reused, slot, length)
        if length in reused.tails or length == sequence.prompt_length:
            tail = self._keep_tail(reused, slot, length)
            if length == sequence.prompt_length:
                reused.prompt_tail = tail

    def pause(self, sequence: ActiveSequence, slot: int, length: int) -> None:
        """The sequence leaves its slot after ``length`` tokens, for a while or for good."""
        reused = sequence.reused
        length = min(length, len(sequence.tokens))
        if self._cache is None or reused is None or not length:
            return
        reused.ids.extend(sequence.tokens[len(reused.ids) : length])
        # What was kept long ago may have gone, and without it nothing behind it is of use.
        reused.kept = min(self._cache.held_blocks(reused.ids), length // self.block_tokens)
        self._keep_blocks(reused, slot, length)
        tail = self._keep_tail(reused, slot, length)
        if reused.visit is not None:
            reused.visit.answer = sequence.answered
        if sequence.request.session and tail is not None:
            self._cache.keep_session(sequence.request.session, tail, reused.prompt_tail)

    def observe(self, sequence: ActiveSequence, masses: Float32) -> None:
        """[blocks] attention that the newest token gave each block."""
        reused = sequence.reused
        if self._cache is None or reused is None:
            return
        blocks = min(len(masses), reused.kept)
        if blocks:
            mean = float(masses[:blocks].mean()) or 1.0
            keys = [self._block_key(reused, index) for index in range(blocks)]
            self._cache.observe(keys, [float(mass) / mean for mass in masses[:blocks]])

    def wants_masses(self, sequence: ActiveSequence, *, ends_prompt: bool) -> bool:
        """Whether this step is one to look at."""
        if not self._watches_attention or sequence.reused is None:
            return False
        return ends_prompt or sequence.answered % OBSERVE_EVERY == OBSERVE_EVERY - 1

    def _keep_blocks(self, reused: Reused, slot: int, length: int) -> None:
        assert self._cache is not None
        size = self.block_tokens
        while (reused.kept + 1) * size <= length:
            export = functools.partial(self._runtime.export_block, slot, reused.kept * size)
            key, seconds = self._block_key(reused, reused.kept), size * self._token_seconds()
            if not self._cache.keep(key, export, recompute_s=seconds, visit=reused.visit):
                break
            reused.kept += 1

    def _keep_tail(self, reused: Reused, slot: int, length: int) -> EntryKey | None:
        """The tail's key where it is held now."""
        assert self._cache is not None
        if reused.kept != length // self.block_tokens or not reused.ids.can_resume_at(length):
            return None
        layout = self._runtime.kv_layout
        key = reused.ids.tail_key(length, layout.tail_bytes(length))
        # Without the tail everything since the last one would be computed again, the window at least.
        seconds = min(length, layout.window) * self._token_seconds()
        export = functools.partial(self._runtime.export_tail, slot, length)
        return key if self._cache.keep(key, export, recompute_s=seconds, visit=reused.visit) else None

    def _block_key(self, reused: Reused, index: int) -> EntryKey:
        return reused.ids.block_key(index, self._runtime.kv_layout.block_bytes)

    def _images(self, request: Request) -> list[ImageSpan]:
        return [
            ImageSpan(start, start + self._image_tokens, content)
            for start, content in zip(request.image_starts, self._contents(request), strict=True)
        ]

    def _contents(self, request: Request) -> Sequence[bytes]:
        """A hash of each image: of its pixels, or of its embeddings where nobody has the pixels."""
        if request.image_hashes or request.image_features is None:
            return request.image_hashes
        size, features = self._image_tokens, request.image_features
        parts = (features[start : start + size] for start in range(0, len(features), size))
        return [identity.content_hash(part.tobytes()) for part in parts]

    def _tails(self, request: Request, hit: Hit) -> set[int]:
        ends = [start + self._image_tokens for start in request.image_starts][-IMAGE_TAILS:]
        branch = hit.match.deepest_block_match
        for start in request.image_starts:
            if start < branch < start + self._image_tokens:
                branch = start
        last = self._last_start(hit.ids)
        odd = (last,) if last < len(hit.ids) - 1 else ()
        return {at for at in (*ends, branch, *odd) if hit.length < at < len(request.input_ids)}
