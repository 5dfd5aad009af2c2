"""A prompt with two images whose KV is kept in a cache and loaded again, for tests."""

from __future__ import annotations

import functools

import numpy as np

from python_backends.kv.identity import ImageSpan, content_hash
from tests.checkpoints import FAMILIES, tiny
from tests.driver import Driver, decoder, vision
from tests.prompts import prompt

BLOCK, CONTEXT = 16, 440


class Kept:
    """A prompt with two images, longer than three windows, and what the cache took of it. Slot 0 computes."""

    def __init__(self, family="4b"):
        self.runtime = decoder(tiny(family), num_slots=3, context=CONTEXT, block_tokens=BLOCK)
        self.encoder = vision(tiny(family))
        self.prompt = prompt(tiny(family), np.random.default_rng(2), text=220, pictures=2)
        self.length = len(self.prompt.ids)
        assert self.length > 3 * FAMILIES[family].text["sliding_window"]
        assert self.runtime._slots.evicted(self.length) > 0
        self.images = [
            ImageSpan(start, end, content_hash(pixels.tobytes()))
            for (start, end), pixels in zip(self.prompt.spans, self.prompt.pixels, strict=True)
        ]

    def boundaries(self):
        """Every position at which a prompt can be resumed."""
        inside = {at for start, end in self.prompt.spans for at in range(start + 1, end)}
        return [at for at in range(1, self.length) if at not in inside]

    def ids(self, cache, salt=""):
        return cache.prompt_ids(self.prompt.ids, self.images, salt)

    def drive(self, *edges, done=0):
        """(logits, tokens) of the prompt from ``done`` on in slot 0, in chunks that end at the edges and at its end."""
        driver = Driver(self.runtime, [self.prompt], self.encoder)
        driver.done[0] = done
        for edge in (*edges, self.length):
            driver.append([(driver.done[0], edge)])
        driver.decode(2)
        return driver.logits[0], driver.tokens[0]

    def begin(self, at):
        """Logits of the first ``at`` tokens, which are in slot 0 then."""
        driver = Driver(self.runtime, [self.prompt], self.encoder)
        driver.append([(0, at)])
        return driver.logits[0]

    def cold(self, cache, at, salt=""):
        """Logits from ``at`` on of a run cut there, its tokens, and the entries kept on the way."""
        self.begin(at)
        keys = self.keep(cache, at, salt)
        return (*self.drive(done=at), keys)

    def keep(self, cache, at, salt=""):
        """Have the cache keep the first ``at`` tokens of slot 0; the keys."""
        ids, layout = self.ids(cache, salt), self.runtime.kv_layout
        blocks = [ids.block_key(index, layout.block_bytes) for index in range(at // BLOCK)]
        for index, key in enumerate(blocks):
            assert cache.keep(key, functools.partial(self.runtime.export_block, 0, index * BLOCK))
        tail = ids.tail_key(at, layout.tail_bytes(at))
        assert cache.keep(tail, functools.partial(self.runtime.export_tail, 0, at))
        return (*blocks, tail)

    def spoil(self):
        """Overwrite every slot, as other sequences do."""
        for buffer in self.runtime._slots.buffers.values():
            buffer[...] = 5.0

    def resumed(self, hit):
        """Logits and tokens after the hit's tokens were loaded into a slot that others have used."""
        self.spoil()
        assert hit.load(self.runtime, 0)
        return self.drive(done=hit.length)
