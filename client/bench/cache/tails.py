"""Where window tails are worth their bytes: what each choice stores, and how much of what is held it lets be used.

Requests are replayed with room for everything, so the choice of places alone decides. A prompt's blocks are of use up
to the deepest tail among them. Traces name whole blocks: the tail at a prompt's end is counted at the end of its last
full block, and answers, which no trace names before they come back in a prompt, have none here; nor has it images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from client.bench.cache.workloads import BLOCK_TOKENS, Request
from client.bench.report import columns
from python_backends.kv.blocks import EntryId

EVERY = (1, 2, 4, 8, 16, 32)
"""Blocks between two tails."""


@dataclass(frozen=True)
class Shape:
    """What a model keeps."""

    name: str
    global_bytes: int
    """Of one token in all global layers."""
    tail_bytes: int
    """Of a whole window of all local layers."""


SHAPES = (
    Shape("1B, float16", 4 * 2 * 256 * 2, 22 * 2 * 256 * 2 * 512),
    Shape("27B, bfloat16", 81_920, 425_984 * 1024),
)


@dataclass(frozen=True)
class Lookup:
    """One request as the choices see it."""

    full: int
    """Its full blocks."""
    held: int
    """Of its blocks, those that are held, from the first on."""
    usable: int
    """Of those, what a tail lets be used."""


Choice = Callable[[Lookup], Sequence[int]]
"""Numbers of blocks behind which a request leaves a tail."""


def _end(seen: Lookup) -> Sequence[int]:
    return (seen.full,)


def _branch(seen: Lookup) -> Sequence[int]:
    """Another prompt parted here before."""
    return (min(seen.held, seen.full),) if seen.held > seen.usable else ()


def _every(blocks: int) -> Choice:
    return lambda seen: range(blocks, seen.full + 1, blocks)


def _both(first: Choice, second: Choice) -> Choice:
    return lambda seen: (*first(seen), *second(seen))


CHOICES: Mapping[str, Choice] = {
    "ends of prompts": _end,
    "branch points seen": _branch,
    "both (what WiCore does)": _both(_end, _branch),
    **{f"every {blocks * BLOCK_TOKENS:,} tokens": _every(blocks) for blocks in EVERY},
}


@dataclass(frozen=True)
class Outcome:
    """One choice over all requests."""

    choice: str
    tails: int
    tokens: int
    """Held, each once."""
    held_tokens: int
    """Of prompts, held when they came."""
    used_tokens: int
    hits: int
    """Prompts of which something was held."""
    used_hits: int
    """Of those, the ones that a tail let use at least half of it."""

    def bytes_per_token(self, shape: Shape) -> float:
        """Of everything kept, per token held."""
        return shape.global_bytes + self.tails * shape.tail_bytes / self.tokens

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        found = {shape.name: self.bytes_per_token(shape) for shape in SHAPES}
        return {**asdict(self), "bytes_per_token": found}


def replay(requests: Sequence[Request], name: str) -> Outcome:
    """Serve the requests one after the other under one of `CHOICES`."""
    blocks: set[EntryId] = set()
    tails: set[EntryId] = set()
    held_blocks = used_blocks = hits = used_hits = 0
    for request in requests:
        ids = [key.id for key in request.keys]
        held = next((index for index, each in enumerate(ids) if each not in blocks), len(ids))
        usable = next((index for index in range(held, 0, -1) if ids[index - 1] in tails), 0)
        held_blocks, used_blocks = held_blocks + held, used_blocks + usable
        hits, used_hits = hits + (held > 0), used_hits + (held > 0 and 2 * usable >= held)
        seen = Lookup(max(0, len(ids) - 1), held, usable)
        blocks.update(ids)
        tails.update(ids[number - 1] for number in CHOICES[name](seen) if number)
    sizes = (len(tails), len(blocks) * BLOCK_TOKENS, held_blocks * BLOCK_TOKENS, used_blocks * BLOCK_TOKENS)
    return Outcome(name, *sizes, hits, used_hits)


def tails_text(outcomes: Sequence[Outcome]) -> str:
    """What `wicore bench tails` prints."""
    heads = ["tails at", "tails", *(f"kB a token, {shape.name}" for shape in SHAPES), "of held tokens used", "of hits"]
    rows = [
        [
            each.choice, f"{each.tails:,}", *(f"{each.bytes_per_token(shape) / 1e3:,.1f}" for shape in SHAPES),
            f"{each.used_tokens / max(1, each.held_tokens):.1%}", f"{each.used_hits / max(1, each.hits):.1%}",
        ]
        for each in outcomes
    ]  # fmt: skip
    return columns(heads, rows)
