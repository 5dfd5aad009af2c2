"""What a lower precision of slower tiers does to answers: the demo's held-out questions, each on KV that was rounded.

Every question is asked twice. The first time leaves the prompt's KV in the cache; the second time all of it but the
last token is taken from there, through the precision's codec, and that answer is judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from client.bench.machine import cores, processor, versions
from client.bench.report import columns
from python_backends.config import KV_PRECISIONS, Config
from python_backends.decoder.engine import Engine
from python_backends.kv.tiers.codec import Codec, make_codec
from python_backends.manifest import Manifest
from python_backends.runtime.base import DecoderRuntime

BATCH = 16
MEMORY_BYTES = 2 * 10**9
"""For kept KV: all of a batch's stays."""


class Rounded:
    """A `DecoderRuntime` whose slots are filled with what a codec gives back."""

    def __init__(self, runtime: DecoderRuntime, codec: Codec) -> None:
        self._runtime, self._codec = runtime, codec
        self.seconds = 0.0
        """Spent rounding, there and back."""
        self.num_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def import_blocks(
        self,
        slot: int,
        blocks: Sequence[memoryview],
        tail: memoryview,
        length: int,
        *,
        keep: int | None = None,
        computed: int = 0,
    ) -> None:
        """See `DecoderRuntime.import_blocks`."""
        began = time.perf_counter()
        *found, last = [self._rounded(payload) for payload in (*blocks, tail)]
        self.seconds += time.perf_counter() - began
        transfer = self._runtime.import_blocks(slot, found, last, length, keep=keep, computed=computed)
        if transfer is not None:  # the buffers are ours
            transfer.wait()

    def _rounded(self, payload: memoryview) -> memoryview:
        self.num_bytes += payload.nbytes
        stored = memoryview(bytearray(self._codec.stored_bytes(payload.nbytes)))
        back = memoryview(bytearray(payload.nbytes))
        self._codec.encode(payload, stored)
        self._codec.decode(stored, back)
        return back


def measure(repository: Path, checkpoint: Path, conversations: int, seed: int, report: Callable[[str], None]) -> Any:
    """Accuracy by precision, and how many answers are those of KV as it is.

    Raises:
        ArtifactError, ConfigError: as `open_runtime`.
    """
    found: dict[str, Any] = {}
    exact: list[str] = []
    for precision in KV_PRECISIONS:
        report(f"{precision} …")
        found[precision], answers = _judge(repository, checkpoint, precision, conversations, seed)
        exact = exact or answers
        found[precision]["same_answers"] = sum(map(str.__eq__, answers, exact)) / len(exact)
    return {
        "configuration": {"conversations": conversations, "seed": seed, "processor": processor(), "cores": cores(),
                          "versions": versions()},
        "precisions": found,
    }  # fmt: skip


def _judge(
    repository: Path, checkpoint: Path, precision: str, conversations: int, seed: int
) -> tuple[dict[str, Any], list[str]]:
    from builders.demo.evaluate import Request, evaluate_batches
    from client.commands.in_process import in_process_answerer

    engines: list[Engine] = []
    runtimes: list[Any] = []
    answers: list[str] = []

    def open_rounded(built: Manifest, settings: Config) -> Engine:
        engine, runtime = _open(built, settings, precision)
        engines.append(engine)
        runtimes.append(runtime)
        return engine

    with in_process_answerer(repository, checkpoint, open_rounded) as answer:

        def twice(asked: Sequence[Request]) -> list[str]:
            answer(asked)
            found = answer(asked)
            answers.extend(found)
            return found

        judged = evaluate_batches(twice, conversations, seed, BATCH, progress=False)
        cache = engines[0].cache
        assert cache is not None
        tokens = dict(cache.stats()["prompt_tokens"])  # type: ignore[call-overload]
    codec = make_codec(precision, runtimes[0].kv_layout.dtype)
    block = runtimes[0].kv_layout.block_bytes
    return {
        "questions": judged.questions,
        "accuracy": judged.accuracy,
        "reused_share": 1 - tokens["computed"] / sum(tokens.values()),
        "stored_share": 1.0 if codec is None else codec.stored_bytes(block) / block,
        "coding_bytes_per_s": runtimes[0].num_bytes / runtimes[0].seconds if codec is not None else None,
    }, answers


def _open(built: Manifest, settings: Config, precision: str) -> tuple[Engine, Any]:
    from python_backends.decoder.open import open_runtime, open_tokenizer
    from python_backends.kv.open import open_cache

    runtime: Any = open_runtime(built, settings)
    codec = make_codec(precision, runtime.kv_layout.dtype)
    runtime = runtime if codec is None else Rounded(runtime, codec)
    cache = open_cache(runtime.kv_layout, precision, settings, MEMORY_BYTES)
    return Engine(runtime, open_tokenizer(built), settings, cache=cache), runtime


def precision_text(found: Mapping[str, Any]) -> str:
    """What `wicore bench precision` prints."""
    rows = [
        [
            name, f"{each['stored_share']:.0%}", f"{each['accuracy']:.2%}", f"{each['same_answers']:.2%}",
            "" if each["coding_bytes_per_s"] is None else f"{each['coding_bytes_per_s'] / 1e9:.2f}",
        ]
        for name, each in found["precisions"].items()
    ]  # fmt: skip
    first = next(iter(found["precisions"].values()))
    return "\n".join(
        [
            f"{first['questions']} held-out questions, {first['reused_share']:.0%} of all prompt tokens from the cache "
            "(every second prompt but its last token)",
            columns(["precision", "stored", "right", "same answer", "coded GB/s"], rows),
        ]
    )
