"""The most likely token of each row, and the log-probability of it or of a given one.

The vocabulary is cut into pieces, one program each; a second launch puts the pieces together.
"""

from __future__ import annotations

from dataclasses import dataclass

from python_backends.runtime.gpu.kernels.lang import cdiv, jit, power_of_two, tl
from python_backends.runtime.gpu.launch import Device, Launch, Tensor

PIECE = 4096
"""Logits of a program."""


@jit
def pieces_kernel(logits, chosen_from, peaks, sums, bests, places, V: tl.constexpr, PIECE: tl.constexpr):
    """Grid (pieces, rows): largest logit and sum of exponentials, and the largest of what is chosen from."""
    piece = tl.program_id(0)
    row = tl.program_id(1)
    ids = piece * PIECE + tl.arange(0, PIECE)
    inside = ids < V
    at = row.to(tl.int64) * V + ids
    values = tl.load(logits + at, mask=inside, other=-float("inf"))
    peak = tl.max(values, 0)
    result = row * tl.num_programs(0) + piece
    tl.store(peaks + result, peak)
    tl.store(sums + result, tl.sum(tl.exp(values - peak), 0))
    values = tl.load(chosen_from + at, mask=inside, other=-float("inf"))
    best = tl.max(values, 0)
    tl.store(bests + result, best)
    tl.store(places + result, tl.min(tl.where(values == best, ids, V - 1), 0))


@jit
def choose_kernel(
    logits,
    targets,
    drawn,
    temperature,
    peaks,
    sums,
    bests,
    places,
    next_token,
    logprob,
    V: tl.constexpr,
    R: tl.constexpr,
    PIECES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid (rows)."""
    row = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    inside = lanes < PIECES
    at = row * PIECES + lanes
    best = tl.load(bests + at, mask=inside, other=-float("inf"))
    place = tl.load(places + at, mask=inside, other=V - 1)
    token = tl.min(tl.where(best == tl.max(best, 0), place, V - 1), 0)
    if drawn is not None:
        token = tl.where(tl.load(temperature + row // R) > 0, tl.load(drawn + row), token)
    target = tl.load(targets + row)
    token = tl.where(target >= 0, target, token)
    high = tl.load(peaks + at, mask=inside, other=-float("inf"))
    peak = tl.max(high, 0)
    total = tl.sum(tl.load(sums + at, mask=inside, other=0.0) * tl.exp(high - peak), 0)
    tl.store(next_token + row, token)
    tl.store(logprob + row, tl.load(logits + row.to(tl.int64) * V + token) - peak - tl.log(total))


@dataclass(frozen=True)
class Scratch:
    """Between the two kernels."""

    peaks: Tensor
    sums: Tensor
    bests: Tensor
    places: Tensor

    @classmethod
    def allocate(cls, device: Device, rows: int, vocab_size: int) -> Scratch:
        """For ``rows`` rows of logits."""
        pieces = cdiv(vocab_size, PIECE)
        peaks, sums, bests = (device.allocate("fp32", rows, pieces) for _ in range(3))
        return cls(peaks, sums, bests, device.allocate("i32", rows, pieces))


def largest(logits: Tensor, chosen_from: Tensor, scratch: Scratch) -> Launch:
    """What `choose`, `most_likely` and a draw need to know of every piece.

    Args:
        logits: float32 [B·R, V], the model's own.
        chosen_from: the same after adjustments and masks.
        scratch: where it goes.
    """
    rows, vocab_size = logits.shape
    return Launch(
        "choice.pieces_kernel",
        (cdiv(vocab_size, PIECE), rows, 1),
        (logits, chosen_from, scratch.peaks, scratch.sums, scratch.bests, scratch.places),
        {"V": vocab_size, "PIECE": PIECE},
    )


def choose(
    logits: Tensor,
    targets: Tensor,
    scratch: Scratch,
    next_token: Tensor,
    logprob: Tensor,
    *,
    drawn: Tensor | None = None,
    temperature: Tensor | None = None,
) -> Launch:
    """The token of every row, and its log-probability in the model's own distribution.

    Args:
        logits: float32 [B·R, V], the model's own.
        targets: int32 [B, R] tokens that are given, −1 where one is to be chosen.
        scratch: as `largest` left it; the lowest of equally likely ids is taken.
        next_token: int32 [B·R].
        logprob: float32 [B·R].
        drawn: int32 [B·R] tokens of the rows that have a temperature.
        temperature: float32 [B], with ``drawn``.
    """
    rows, vocab_size = logits.shape
    pieces = cdiv(vocab_size, PIECE)
    parts = (scratch.peaks, scratch.sums, scratch.bests, scratch.places)
    return Launch(
        "choice.choose_kernel",
        (rows, 1, 1),
        (logits, targets, drawn, temperature, *parts, next_token, logprob),
        {"V": vocab_size, "R": targets.shape[1], "PIECES": pieces, "LANES": power_of_two(pieces)},
        num_warps=1,
    )
