"""The token masks of a step: computed beside the engine's thread, one row per position that may draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from python_backends.decoder.mask_pool import UNCONSTRAINED, MaskJob, MaskPool
from python_backends.decoder.scheduler import Step
from python_backends.decoder.sequence import ActiveSequence
from python_backends.errors import WiCoreError
from python_backends.runtime.base import DecoderSpec


@dataclass(frozen=True)
class _Pending:
    sequences: tuple[ActiveSequence, ...]
    errors: Future[list[WiCoreError | None]]


class StepMasks:
    """Masks by sequence; placed by slot when a step needs them.

    Args:
        spec: of the runtime.
        max_draft: draft tokens per row.
    """

    def __init__(self, spec: DecoderSpec, max_draft: int) -> None:
        self._shape = 1 + max_draft, -(-spec.vocab_size // 32)
        self._num_slots = spec.num_slots
        self._pool = MaskPool()
        self._pending: list[_Pending] = []
        self._ready: dict[int, NDArray[np.int32]] = {}
        self._errors: dict[int, WiCoreError] = {}

    def submit(self, jobs: Iterable[tuple[ActiveSequence, tuple[int, ...]]]) -> None:
        """Start on the next masks of sequences that have just drawn the tokens beside them."""
        jobs = [(sequence, accepted) for sequence, accepted in jobs if sequence.matcher is not None]
        if not jobs:
            return
        rows = self._shape[0]
        out = np.full((len(jobs) * rows, self._shape[1]), UNCONSTRAINED, np.int32)
        batch = [
            MaskJob(sequence.matcher, number * rows, accepted, tuple(sequence.draft))  # type: ignore[arg-type]
            for number, (sequence, accepted) in enumerate(jobs)
        ]
        for number, (sequence, _) in enumerate(jobs):
            self._ready[sequence.sequence_id] = out[number * rows : (number + 1) * rows]
        self._pending.append(_Pending(tuple(sequence for sequence, _ in jobs), self._pool.submit(batch, out)))

    def collect(self, step: Step, sequences: Mapping[int, ActiveSequence]) -> NDArray[np.int32] | None:
        """[slots, R, words] for the rows of a step that draw; None where none has a grammar.

        Masks stand at the end of R = 1 + the longest draft of the step, as the positions do. What stopped a grammar is
        in `take_error`; its rows allow everything.
        """
        rows = [row for row in step.rows if row.samples]
        constrained = [row for row in rows if sequences[row.sequence_id].matcher is not None]
        if not constrained:
            return None
        self.submit((sequences[row.sequence_id], ()) for row in constrained if row.sequence_id not in self._ready)
        self._wait()
        wanted = max(1 + len(sequences[row.sequence_id].draft) for row in rows)
        masks = np.full((self._num_slots, wanted, self._shape[1]), UNCONSTRAINED, np.int32)
        for row in constrained:
            count = 1 + len(sequences[row.sequence_id].draft)
            masks[row.slot, wanted - count :] = self._ready[row.sequence_id][:count]
        return masks

    def take_error(self, sequence_id: int) -> WiCoreError | None:
        """What stopped a sequence's grammar, once."""
        return self._errors.pop(sequence_id, None)

    def forget(self, sequence_id: int) -> None:
        """A sequence has ended."""
        self._ready.pop(sequence_id, None)
        self._errors.pop(sequence_id, None)

    def close(self) -> None:
        """End the pool."""
        self._pool.close()

    def _wait(self) -> None:
        for pending in self._pending:
            for sequence, error in zip(pending.sequences, pending.errors.result(), strict=True):
                if error is not None:
                    self._errors[sequence.sequence_id] = error
        self._pending.clear()
