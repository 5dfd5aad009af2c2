"""The masks of many sequences at once, beside the engine's thread."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import llguidance
import numpy as np
from numpy.typing import NDArray

from python_backends.decoder.grammar import Matcher
from python_backends.errors import WiCoreError

UNCONSTRAINED = -1
"""A word that allows everything: rows of sequences without a grammar."""


@dataclass(frozen=True)
class MaskJob:
    """What one sequence needs for its next step.

    First ``accepted``, the tokens drawn in the last step, are stepped over. Row ``row`` then gets the mask of the next
    token and rows ``row + 1 …`` those after each token of ``draft``, as far as the draft fits the grammar.
    """

    matcher: Matcher
    row: int
    accepted: tuple[int, ...] = ()
    draft: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """How many rows the job may write."""
        return 1 + len(self.draft)


class MaskPool:
    """Computes masks while the device works. The result depends on the jobs alone, not on threads or timing.

    One call computes all masks of a step outside the interpreter's lock: a call for each sequence would wait for the
    lock each time, up to 5 ms while the engine's thread is busy.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._executor = llguidance.LLExecutor(threads or min(8, os.cpu_count() or 1))
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def submit(self, jobs: Sequence[MaskJob], out: NDArray[np.int32]) -> Future[list[WiCoreError | None]]:
        """Start on a step's masks; neither ``out`` nor the matchers may be touched until the future is done.

        Args:
            jobs: with distinct matchers and rows that do not overlap.
            out: [R, ceil(V / 32)] int32, contiguous; rows of no job keep their content. Rows after a draft token that
                does not fit allow everything: that token is refused before they count.

        Returns:
            For each job None, or what stopped its grammar; its rows then allow everything, and the others are right.

        Raises:
            ValueError: rows outside ``out`` or overlapping, one matcher twice, or a wrong array.
        """
        taken: set[int] = set()
        for job in jobs:
            rows = range(job.row, job.row + job.rows)
            if not taken.isdisjoint(rows) or not 0 <= job.row <= len(out) - job.rows:
                raise ValueError(f"rows {rows} overlap another job's or lie outside the {len(out)} of the array")
            taken.update(rows)
            job.matcher.check_rows(out, len(out))
        if len({id(job.matcher) for job in jobs}) < len(jobs):
            raise ValueError("a matcher has one job in a step")
        return self._worker.submit(self._compute, list(jobs), out)

    def close(self) -> None:
        """Wait for the step under way and end the thread."""
        self._worker.shutdown()

    def _compute(self, jobs: list[MaskJob], out: NDArray[np.int32]) -> list[WiCoreError | None]:
        errors = [_accept(job) for job in jobs]
        for job in jobs:
            out[job.row : job.row + job.rows] = UNCONSTRAINED
        going = [job for job, error in zip(jobs, errors, strict=True) if error is None]
        self._masks([job for job in going if not job.draft], out)
        self._draft_masks([job for job in going if job.draft], out)
        return [error or _error(job, out) for job, error in zip(jobs, errors, strict=True)]

    def _masks(self, jobs: list[MaskJob], out: NDArray[np.int32]) -> None:
        for job in jobs:
            if job.matcher.has_ended:
                job.matcher.mask(out[job.row])
        targets = [(job.matcher.inner, job.row) for job in jobs if not job.matcher.has_ended]
        if targets:
            self._executor.unsafe_compute_mask_ptr(targets, out.ctypes.data, out[0].nbytes, len(out))

    def _draft_masks(self, jobs: list[MaskJob], out: NDArray[np.int32]) -> None:
        plain: list[MaskJob] = []
        drafts = []
        for job in jobs:
            text, _ = job.matcher.split_at_eos(job.draft)  # nothing is drawn after it
            if text and not job.matcher.has_ended:
                drafts.append((job.matcher.inner, job.row, text))
            else:
                plain.append(job)
        if drafts:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafts, out.ctypes.data, out[0].nbytes, len(out))
        self._masks(plain, out)


def _accept(job: MaskJob) -> WiCoreError | None:
    try:
        for token in job.accepted:
            job.matcher.accept(token)
    except WiCoreError as error:
        return error
    return None


def _error(job: MaskJob, out: NDArray[np.int32]) -> WiCoreError | None:
    try:
        job.matcher.raise_error()
    except WiCoreError as error:
        out[job.row : job.row + job.rows] = UNCONSTRAINED
        return error
    return None
