"""How sequences get into the scheduler: at once, when what the cache holds of them is in memory, or behind another.

The answers of one request (``n``) share a beginning: the first computes it and the others wait for it. Called with the
engine's lock held, but where a method says otherwise.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from python_backends.decoder.reuse import Reuse
from python_backends.decoder.scheduler import Scheduler
from python_backends.decoder.sequence import ActiveSequence
from python_backends.errors import InternalError, WiCoreError
from python_backends.kv.hit import Hit
from python_backends.runtime.base import DecoderRuntime

log = logging.getLogger("wicore")

PROMPT_LOGPROBS_CHUNK = 64
"""Prompt tokens a step where their log-probabilities are wanted: each needs a row of logits."""


class Intake:
    """See the module.

    Args:
        scheduler: takes the sequences.
        reuse: looks at what the cache holds.
        runtime: whose slots a shared beginning is copied from.
        sequences: those of the engine, by id.
        changed: the engine's lock; notified when a sequence can go on.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        reuse: Reuse,
        runtime: DecoderRuntime,
        sequences: dict[int, ActiveSequence],
        changed: threading.Condition,
    ) -> None:
        self._scheduler = scheduler
        self._reuse = reuse
        self._runtime = runtime
        self._sequences = sequences
        self._changed = changed
        self._forks: dict[int, list[ActiveSequence]] = {}
        """By the sequence that computes the shared beginning: those waiting for it."""
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="wicore-reencode")

    @property
    def waiting(self) -> Iterator[int]:
        """Sequences that the scheduler does not know yet."""
        return (each.sequence_id for forks in self._forks.values() for each in forks)

    @property
    def num_waiting(self) -> int:
        """How many they are; each will want a place in the queue."""
        return sum(map(len, self._forks.values()))

    def queue(self, sequences: list[ActiveSequence], hit: Hit | None) -> None:
        """Queue the answers of one request: all at once, or the first, and the others when the prompt is computed."""
        first, *others = sequences
        size = self._runtime.spec.tokens_per_image
        shared = first.prompt_length - 1
        splits_image = any(start < shared < start + size for start in first.request.image_starts)
        self._reuse.begin(first, hit)
        for sequence in others:
            self._reuse.begin(sequence, None)
        together = bool(others and shared) and not splits_image
        if together:
            self._forks[first.sequence_id] = others
        self._add_found(first, hit, (shared,) if together else ())
        for sequence in () if together else others:
            self._add(sequence)

    def share(self, sequence_id: int, slot: int, computed: int) -> None:
        """Where a shared beginning is computed, queue the sequences that wait for it. Called without the lock."""
        sequence = self._sequences.get(sequence_id)
        if sequence_id not in self._forks or sequence is None or computed != sequence.prompt_length - 1:
            return
        state = self._runtime.export_slot(slot, computed)
        with self._changed:
            for fork in self._forks.pop(sequence_id):
                fork.state = state
                self._add(fork, computed=computed)

    def compute_all(self, sequence: ActiveSequence) -> None:
        """What a sequence was to have in its slot is lost: off the slot, and from the beginning. Without the lock."""
        with self._changed:
            self._scheduler.hold(sequence.sequence_id)
            self._release(sequence)

    def remove(self, sequence: ActiveSequence) -> None:
        """Forget a sequence; nobody computes a beginning for others then."""
        waiting = next((forks for forks in self._forks.values() if sequence in forks), None)
        if waiting is not None:
            waiting.remove(sequence)
            return
        self._scheduler.remove(sequence.sequence_id)
        for fork in self._forks.pop(sequence.sequence_id, ()):
            self._add(fork)

    def close(self) -> None:
        """End the thread. Called without the lock."""
        self._encoder.shutdown(cancel_futures=True)

    def _add_found(self, sequence: ActiveSequence, hit: Hit | None, boundaries: Sequence[int]) -> None:
        """Queue a sequence of which the cache may hold something; on hold until that is in memory."""
        self._add(sequence, (*boundaries, *self._reuse.boundaries(sequence)), held=True)
        if hit is None or not hit.when_loaded(lambda: self._found(sequence)):
            self._found(sequence)

    def _found(self, sequence: ActiveSequence) -> None:
        """What the cache holds of a sequence on hold, if anything, is in memory. With the lock or without it."""
        with self._changed:
            if sequence.sequence_id not in self._sequences:
                return
            self._release(sequence, self._reuse.found(sequence))
            self._changed.notify_all()

    def _release(self, sequence: ActiveSequence, length: int = 0) -> None:
        """Let a sequence on hold begin behind the ``length`` tokens that were found; images that lie further though
        their KV was counted on are encoded first."""
        counted = sequence.request.image_starts[: sequence.request.encoded_from]
        if any(start >= length for start in counted):
            self._encoder.submit(self._encode_rest, sequence, length)
        else:
            self._scheduler.release(sequence.sequence_id, length)

    def _encode_rest(self, sequence: ActiveSequence, length: int) -> None:
        request = sequence.request
        try:
            assert request.encode_rest is not None
            parts = [part for part in (request.encode_rest(), request.image_features) if part is not None]
            sequence.request = dataclasses.replace(request, image_features=np.concatenate(parts), encoded_from=0)
        except WiCoreError as error:
            sequence.failure = error
        except Exception:
            log.exception("images could not be encoded")
            sequence.failure = InternalError("the images could not be encoded; see the server's log")
        with self._changed:
            if sequence.sequence_id in self._sequences:
                self._scheduler.release(sequence.sequence_id, length)
            self._changed.notify_all()

    def _add(
        self, sequence: ActiveSequence, boundaries: Sequence[int] = (), computed: int = 0, *, held: bool = False
    ) -> None:
        parameters, size = sequence.request.parameters, self._runtime.spec.tokens_per_image
        limits = {} if parameters.prompt_logprobs is None else {"largest_chunk": PROMPT_LOGPROBS_CHUNK}
        self._scheduler.add(
            sequence.sequence_id,
            sequence.prompt_length,
            [(start, start + size) for start in sequence.request.image_starts],
            priority=parameters.priority,
            size=sequence.prompt_length + sequence.max_tokens,
            boundaries=boundaries,
            computed=computed,
            held=held,
            **limits,
        )
