"""Whether attention tells what is asked for again: conversations of the demo checkpoint, replayed with and without it.

The decode engine answers long conversations about pictures, and reports as it does while serving what attention the
end of each prompt gave to each block. Those prompts then come to the KV cache's manager as requests, with masses, under
several weights of attention. When conversations begin and go on is drawn at random, since nobody recorded it together
with what was said: what is found here is whether attention helps beyond what a block's place already tells.
"""

from __future__ import annotations

import io
import json
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from builders.demo.drawing import model_pixels, render
from builders.demo.evaluate import request
from builders.demo.model import IMAGE_SIZE
from builders.demo.questions import HELD_OUT, Conversation, Turn, conversation
from client.bench.cache.simulate import replay
from client.bench.cache.workloads import Namer, Request
from client.bench.report import columns
from python_backends import config, contract
from python_backends.decoder import sequence
from python_backends.decoder.engine import Engine
from python_backends.decoder.open import open_runtime, open_tokenizer
from python_backends.decoder.parameters import parameters_within
from python_backends.errors import InternalError
from python_backends.kv.blocks import EntryId, EntryKey, Tier, TierLimits
from python_backends.kv.cache import KvCache
from python_backends.kv.manager import KvManager
from python_backends.kv.policies import make_policies
from python_backends.kv.tiers.arena import Arena, alignment_for
from python_backends.manifest import Manifest
from python_backends.prompt import open_tokenizer as open_prompts
from python_backends.runtime.base import Float32, KvLayout, UInt8
from python_backends.runtime.onnxruntime import OnnxRuntimeVision

BLOCK_TOKENS = 16
"""A conversation of the demo checkpoint has some hundred tokens."""
TURNS = (4, 24)
"""Fewest and most that a conversation is asked to have."""
EDITED = 0.2
"""Of the turns, how many take the place of the one before: a user who asks again in other words."""
ANSWER_TOKENS = 80
MEMORY_BYTES = 2**29
"""More than one conversation leaves."""
WEIGHTS = (0.0, 0.5, 1.0)
CONTROL_WEIGHT, OTHERS = 0.5, "others"
ARRIVALS = 8
"""Draws of the times."""


@dataclass(frozen=True)
class Asked:
    """A prompt of full blocks, and the mass of each, relative to the prompt's mean."""

    blocks: tuple[EntryId, ...]
    masses: tuple[float, ...]


Talk = list[Asked]
"""The turns of a conversation, in order."""


# -- recording ---------------------------------------------------------------------------------------------------------
class _Recorder:
    """An engine, and the masses that it reports to its cache."""

    def __init__(self, built: Manifest, opened: ExitStack) -> None:
        self._settings = replace(
            config.load(built.repository), kv_block_tokens=BLOCK_TOKENS, max_batch_size=1, max_draft=0,
            hmt_attention_weight=1.0,
        )  # fmt: skip
        self._prompts = open_prompts(built.repository)
        self._vision = OnnxRuntimeVision(built.folder(contract.VISION_ENCODER))
        opened.callback(self._vision.close)
        runtime = open_runtime(built, self._settings)
        cache = _open_cache(runtime.kv_layout, self._note)
        self._engine = Engine(runtime, open_tokenizer(built), self._settings, cache=cache)
        opened.callback(self._engine.close)
        self._noted: Asked | None = None

    def _note(self, keys: Sequence[EntryKey], masses: Sequence[float]) -> None:
        """Of a request the first: its prompt has ended."""
        if self._noted is None:
            self._noted = Asked(tuple(key.id for key in keys), tuple(masses))

    def encode(self, pixels: UInt8) -> Float32:
        """[tokens per image, D] of a picture [H, W, 3]."""
        features: Float32 = self._vision.encode(pixels.transpose(2, 0, 1)[None])[0]
        return features

    def ask(
        self, messages: list[dict[str, Any]], images: Sequence[bytes], features: Float32 | None
    ) -> tuple[Asked, str]:
        """What the prompt was, and the answer.

        Raises:
            InternalError: the cache did not hold all of the prompt.
        """
        prompt = self._prompts([], [json.dumps(messages).encode()], images)
        ids = prompt.input_ids.tolist()
        parameters = parameters_within(self._settings, max_tokens=ANSWER_TOKENS, temperature=0.0)
        pieces: list[sequence.Piece] = []
        done = threading.Event()

        def sink(piece: sequence.Piece) -> None:
            pieces.append(piece)
            if piece.finish_reason:
                done.set()

        self._noted = None if len(ids) >= BLOCK_TOKENS else Asked((), ())
        starts = prompt.image_starts.tolist()
        self._engine.submit(sequence.Request(ids, parameters, sink, image_starts=starts, image_features=features))
        done.wait()
        if self._noted is None or len(self._noted.blocks) != len(ids) // BLOCK_TOKENS:
            raise InternalError(f"masses of {self._noted and len(self._noted.blocks)} blocks of {len(ids)} tokens")
        return self._noted, "".join(piece.text for piece in pieces)


def _open_cache(layout: KvLayout, note: Callable[[Sequence[EntryKey], Sequence[float]], None]) -> KvCache:
    """One tier in memory that tells ``note`` what it is told of attention."""

    class Watched(KvCache):
        def observe(self, keys: Sequence[EntryKey], masses: Sequence[float]) -> None:
            note(keys, masses)
            super().observe(keys, masses)

    arena = Arena("device", MEMORY_BYTES, alignment=alignment_for(layout.block_bytes))
    limits: dict[Tier, TierLimits] = {"device": TierLimits(arena.usable_bytes)}
    manager = KvManager(limits, make_policies("lru", limits), block_tokens=layout.block_tokens)
    return Watched(layout, "recording", manager, {"device": arena}, {"device": arena})


def record(built: Manifest, conversations: int, seed: int, report: Callable[[str], None]) -> list[Talk]:
    """Held-out conversations, each going on with the answers the model gave.

    Raises:
        ArtifactError: the repository is not built.
    """
    rng = random.Random(f"attention/{seed}")
    talks = []
    with ExitStack() as opened:
        recorder = _Recorder(built, opened)
        for index in range(conversations):
            report(f"conversation {index + 1} of {conversations} …")
            talks.append(_hold(recorder, conversation(HELD_OUT, seed, index, turns_least=rng.randint(*TURNS)), rng))
    return talks


def _hold(recorder: _Recorder, talk: Conversation, rng: random.Random) -> Talk:
    pictures = [render(scene) for scene in talk.scenes]
    encoded = [_png(picture) for picture in pictures]
    features = [recorder.encode(model_pixels(picture, IMAGE_SIZE)) for picture in pictures]
    turns: list[Turn] = []
    answers: list[str] = []
    found = []
    for turn in talk.turns:
        if turns and not turns[-1].pictures and rng.random() < EDITED:
            del turns[-1], answers[-1]
        turns.append(turn)
        messages, shown = request(replace(talk, turns=tuple(turns)), len(answers), answers, pictures)
        count = len(shown)
        asked, answer = recorder.ask(messages, encoded[:count], np.concatenate(features[:count]) if count else None)
        answers.append(answer)
        found += [asked] if asked.blocks else []
    return found


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


# -- replaying ---------------------------------------------------------------------------------------------------------
def requests_of(talks: Sequence[Talk], seed: int) -> list[Request]:
    """Conversations begin within an hour; their turns are 60 s apart (log-normal), as in `workloads.multi_turn`."""
    rng = np.random.default_rng(seed)
    namer = Namer()
    found = []
    for talk in talks:
        time = float(rng.uniform(0, 3600))
        for asked in talk:
            found.append(Request(time, namer.keys(asked.blocks), masses=asked.masses))
            time += float(rng.lognormal(np.log(60), 0.8))
    return sorted(found, key=lambda request: request.time)


def with_masses_of_others(talks: Sequence[Talk], seed: int) -> list[Talk]:
    """Every prompt with the masses of a random prompt that is as long: what is left is what a block's place tells."""
    rng = random.Random(seed)
    by_length: dict[int, list[tuple[float, ...]]] = {}
    for asked in (asked for talk in talks for asked in talk):
        by_length.setdefault(len(asked.blocks), []).append(asked.masses)
    for masses in by_length.values():
        rng.shuffle(masses)
    return [[Asked(asked.blocks, by_length[len(asked.blocks)].pop()) for asked in talk] for talk in talks]


@dataclass(frozen=True)
class Outcome:
    """One capacity over all draws of the times."""

    capacity: int
    """Blocks."""
    lru: float
    belady: float
    """Share of the prompts' tokens that was held, mean over the draws, as the next."""
    by_weight: dict[str, float]
    """Weight of attention; `OTHERS`: `CONTROL_WEIGHT` on the masses of other prompts."""
    gains: dict[str, tuple[float, float]]
    """Over weight 0: mean of the differences, draw by draw, and its standard error."""

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


def compare(talks: Sequence[Talk], capacity: int, seed: int) -> Outcome:
    """Replay the conversations under every weight, `ARRIVALS` times."""
    rates: dict[str, list[float]] = {}

    def note(name: str, talks: Sequence[Talk], draw: int, policy: str, weight: float = 0.0) -> None:
        found = replay(requests_of(talks, seed + draw), policy, capacity, 1, attention_weight=weight)
        rates.setdefault(name, []).append(found.token_hit_rate)

    for draw in range(ARRIVALS):
        for policy in ("lru", "belady"):
            note(policy, talks, draw, policy)
        for weight in WEIGHTS:
            note(f"{weight:g}", talks, draw, "a2cr", weight)
        note(OTHERS, with_masses_of_others(talks, seed + draw), draw, "a2cr", CONTROL_WEIGHT)
    means = {name: float(np.mean(values)) for name, values in rates.items()}
    lru, belady = means.pop("lru"), means.pop("belady")
    gains = {}
    for name in list(means)[1:]:
        difference = np.subtract(rates[name], rates["0"])
        gains[name] = (float(difference.mean()), float(difference.std(ddof=1) / ARRIVALS**0.5))
    return Outcome(capacity, lru, belady, means, gains)


def attention_text(talks: Sequence[Talk], outcomes: Sequence[Outcome]) -> str:
    """What `wicore bench attention` prints."""
    first = outcomes[0]
    heads = ["blocks", "LRU", *(f"A²CR, {name}" for name in first.by_weight), "Belady"]
    heads += [f"gain by {name}" for name in first.gains]
    rows = [
        [
            each.capacity, *(f"{rate:.4f}" for rate in (each.lru, *each.by_weight.values(), each.belady)),
            *(f"{1e4 * mean:+.1f} ± {1e4 * error:.1f}" for mean, error in each.gains.values()),
        ]
        for each in outcomes
    ]  # fmt: skip
    prompts = sum(map(len, talks))
    blocks = len({block for talk in talks for asked in talk for block in asked.blocks})
    return (
        f"{len(talks)} conversations, {prompts} prompts, {blocks} blocks of {BLOCK_TOKENS} tokens; "
        f"token hit rate, mean of {ARRIVALS} draws of the times; gains in 1/10,000, ± standard error\n\n"
        f"{columns(heads, rows)}"
    )
