"""Requests to replay: the recorded trace, and generators of what serves badly from a cache.

A request is its arrival time and its prompt's blocks; a block is `BLOCK_TOKENS` tokens, one unit of capacity, and named
by everything before it, as the manager names them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from python_backends.errors import InvalidParameterError
from python_backends.kv.blocks import EntryId, EntryKey

BLOCK_TOKENS = 512
TRACE = Path(__file__).with_name("traces") / "conversation_trace.jsonl"
ROOT = bytes(32)
RECORDED = "conversation"
"""The recorded trace among the workloads."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. ``keys`` stand for its blocks, first to last."""

    time: float
    keys: tuple[EntryKey, ...]
    answer: int = 0
    """Tokens of the answer; 0: not told."""
    masses: tuple[float, ...] = ()
    """Attention that the prompt's end gave each block, relative to their mean; none: not told."""

    def __len__(self) -> int:
        """Tokens; the last block counts as full."""
        return len(self.keys) * BLOCK_TOKENS

    def block_id(self, index: int) -> EntryId:
        """As `PromptIds`."""
        return self.keys[index].id if index >= 0 else ROOT

    def can_resume_at(self, length: int) -> bool:
        """As `PromptIds`: blocks only."""
        return length % BLOCK_TOKENS == 0

    def tail_id(self, length: int) -> EntryId:
        """As `PromptIds`; a trace has no tails."""
        raise ValueError(f"a trace has no tail at {length}")


class Namer:
    """Names → keys; equal beginnings get equal keys."""

    def __init__(self) -> None:
        self._keys: dict[EntryId, EntryKey] = {}

    def keys(self, names: Sequence[object]) -> tuple[EntryKey, ...]:
        """``names``: one per block; equal only where the blocks' own tokens are equal."""
        parent, found = ROOT, []
        for index, name in enumerate(names):
            entry_id = blake2b(parent + repr(name).encode(), digest_size=32).digest()
            key = self._keys.get(entry_id)
            if key is None:
                position = (index + 1) * BLOCK_TOKENS
                key = self._keys[entry_id] = EntryKey(entry_id, "block", parent, position, 1, ROOT)
            found.append(key)
            parent = entry_id
        return tuple(found)


def conversation_trace(path: Path = TRACE) -> list[Request]:
    """The recorded hour (see traces/README.md)."""
    namer = Namer()
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Request(row["timestamp"] / 1000, namer.keys(row["hash_ids"]), row["output_length"]) for row in rows]


def _in_order(arrivals: Iterator[tuple[float, list[object]]]) -> list[Request]:
    namer = Namer()
    return [Request(time, namer.keys(names)) for time, names in sorted(arrivals, key=lambda arrival: arrival[0])]


def multi_turn(seed: int, sessions: int = 700) -> list[Request]:
    """Conversations of 1 + Geometric(0.25) turns, 60 s (log-normal) apart, each adding 1–6 blocks; half share a
    system prompt of two blocks."""
    rng = np.random.default_rng(seed)

    def arrivals() -> Iterator[tuple[float, list[object]]]:
        for session in range(sessions):
            time = float(rng.uniform(0, 3600))
            names: list[object] = ["system", "prompt"] if rng.random() < 0.5 else []
            for turn in range(int(rng.geometric(0.25))):
                names += [(session, turn, block) for block in range(int(rng.integers(1, 7)))]
                yield time, [*names, (session, turn, "end")]
                time += float(rng.lognormal(np.log(60), 0.8))

    return _in_order(arrivals())


def shared_prompts(seed: int, requests: int = 4000) -> list[Request]:
    """40 system prompts of 4–24 blocks, Zipf-popular, each request with 1–4 blocks of its own that never come back."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 25, 40)
    popularity = 1 / np.arange(1, 41) ** 0.9
    chosen = rng.choice(40, requests, p=popularity / popularity.sum())
    times = np.cumsum(rng.exponential(0.9, requests))

    def arrivals() -> Iterator[tuple[float, list[object]]]:
        for index, (time, prompt) in enumerate(zip(times, chosen, strict=True)):
            names: list[object] = [("system", int(prompt), block) for block in range(lengths[prompt])]
            yield float(time), names + [("own", index, block) for block in range(int(rng.integers(1, 5)))]

    return _in_order(arrivals())


def agents(seed: int, tasks: int = 60) -> list[Request]:
    """Agents that work on a tree: 30 steps 8 s apart, each going on from the newest (70 %) or from any earlier node."""
    rng = np.random.default_rng(seed)

    def arrivals() -> Iterator[tuple[float, list[object]]]:
        for task in range(tasks):
            time = float(rng.uniform(0, 3000))
            nodes: list[list[object]] = [["tools", "rules", (task, "goal")]]
            for step in range(30):
                parent = nodes[-1] if rng.random() < 0.7 else nodes[int(rng.integers(len(nodes)))]
                nodes.append([*parent, *((task, step, block) for block in range(int(rng.integers(1, 4))))])
                yield time, nodes[-1]
                time += float(rng.exponential(8))

    return _in_order(arrivals())


def scan(seed: int) -> list[Request]:
    """`multi_turn` with a batch job amid it: every 4 s a document of 40 blocks that nobody asks for again."""
    rng = np.random.default_rng(seed + 1)
    documents = [(float(time), index) for index, time in enumerate(np.arange(900, 2700, 4) + rng.uniform(0, 2, 450))]
    namer = Namer()
    flood = [Request(time, namer.keys([("scan", index, block) for block in range(40)])) for time, index in documents]
    return sorted([*multi_turn(seed, 500), *flood], key=lambda request: request.time)


def zipf(seed: int, requests: int = 12_000) -> list[Request]:
    """Independent requests for 3,000 documents of 1–8 blocks by Zipf's law (exponent 0.8), no structure in time."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, 3000)
    popularity = 1 / np.arange(1, 3001) ** 0.8
    chosen = rng.choice(3000, requests, p=popularity / popularity.sum())
    times = np.cumsum(rng.exponential(0.3, requests))
    return _in_order(
        (float(time), [(int(document), block) for block in range(lengths[document])])
        for time, document in zip(times, chosen, strict=True)
    )


def loop(seed: int, rounds: int = 12) -> list[Request]:
    """600 prompts of 5 blocks asked for in turn, over and over: what LRU serves worst."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(0.5, rounds * 600))
    return _in_order((float(time), [(index % 600, block) for block in range(5)]) for index, time in enumerate(times))


GENERATORS: dict[str, Callable[[int], list[Request]]] = {
    "multi-turn": multi_turn, "shared-prompts": shared_prompts, "agents": agents, "scan": scan, "zipf": zipf,
    "loop": loop,
}  # fmt: skip


def read_workload(name: str, trace: Path | None, seed: int) -> tuple[list[Request], str]:
    """The requests of another trace file, or of the workload of that name, and what to call them.

    Raises:
        InvalidParameterError: no such workload.
    """
    if name != RECORDED and name not in GENERATORS:
        known = ", ".join([RECORDED, *GENERATORS])
        raise InvalidParameterError(f"there is no workload {name!r}; choose among {known}")
    if trace is not None:
        return conversation_trace(trace), str(trace)
    return conversation_trace() if name == RECORDED else GENERATORS[name](seed), name
