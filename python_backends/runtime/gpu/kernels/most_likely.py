"""The most likely tokens of each row, with their log-probabilities in the model's own distribution.

Each piece of the vocabulary leaves its most likely tokens; a second launch takes the most likely of these.
"""

from __future__ import annotations

from python_backends.runtime.gpu.kernels import choice
from python_backends.runtime.gpu.kernels.lang import cdiv, jit, power_of_two, tl
from python_backends.runtime.gpu.launch import Device, Launch, Tensor

MAX_TOP_N = 32
"""Most tokens that are reported."""
_ID_BITS = tl.constexpr(20)
_LAST_ID = tl.constexpr((1 << 20) - 1)
_LOWEST = tl.constexpr(-(1 << 63))


@jit
def pieces_kernel(logits, found, V: tl.constexpr, N: tl.constexpr, PIECE: tl.constexpr):
    """Grid (pieces, rows): the N largest of a piece.

    A logit's bits, ordered as integers, and in the lower bits the id: larger is more likely, the lower of equals first.
    """
    row = tl.program_id(1)
    ids = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    bits = tl.load(logits + row.to(tl.int64) * V + ids, mask=ids < V, other=-float("inf")).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rank = (ordered.to(tl.int64) << _ID_BITS) + (_LAST_ID - ids)
    rank = tl.where(ids < V, rank, _LOWEST)
    to = found + (row * tl.num_programs(0) + tl.program_id(0)) * N
    for index in range(N):
        largest = tl.max(rank, 0)
        tl.store(to + index, largest)
        rank = tl.where(rank == largest, _LOWEST, rank)


@jit
def join_kernel(
    found,
    peaks,
    sums,
    top_ids,
    top_logprobs,
    N: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE_LANES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid (rows): the N largest of all pieces."""
    row = tl.program_id(0)
    pieces = tl.arange(0, PIECE_LANES)
    high = tl.load(peaks + row * PIECES + pieces, mask=pieces < PIECES, other=-float("inf"))
    peak = tl.max(high, 0)
    total = tl.sum(tl.load(sums + row * PIECES + pieces, mask=pieces < PIECES, other=0.0) * tl.exp(high - peak), 0)
    lanes = tl.arange(0, LANES)
    inside = lanes < PIECES * N
    rank = tl.load(found + row * PIECES * N + lanes, mask=inside, other=_LOWEST)
    for index in range(N):
        largest = tl.max(rank, 0)
        ordered = (largest >> _ID_BITS).to(tl.int32)
        value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(top_ids + row * N + index, _LAST_ID - (largest & _LAST_ID).to(tl.int32))
        tl.store(top_logprobs + row * N + index, value - peak - tl.log(total))
        rank = tl.where(rank == largest, _LOWEST, rank)


def allocate_scratch(device: Device, rows: int, vocab_size: int) -> Tensor:
    """Between the two kernels, for ``rows`` rows of logits."""
    return device.allocate("i64", rows, cdiv(vocab_size, choice.PIECE) * MAX_TOP_N)


def most_likely(
    logits: Tensor, pieces: choice.Scratch, scratch: Tensor, top_ids: Tensor, top_logprobs: Tensor
) -> list[Launch]:
    """The most likely tokens in falling order, the lower id first among equals.

    Args:
        logits: float32 [B·R, V], the model's own; V below 2²⁰.
        pieces: as `choice.largest` left it.
        scratch: of `allocate_scratch`; contents mean nothing before and after.
        top_ids: int32 [B·R, N], N a power of two of at most `MAX_TOP_N`.
        top_logprobs: float32 [B·R, N].
    """
    rows, vocab_size = logits.shape
    top, count = top_ids.shape[1], cdiv(vocab_size, choice.PIECE)
    return [
        Launch(
            "most_likely.pieces_kernel",
            (count, rows, 1),
            (logits, scratch),
            {"V": vocab_size, "N": top, "PIECE": choice.PIECE},
            num_warps=8,
        ),
        Launch(
            "most_likely.join_kernel",
            (rows, 1, 1),
            (scratch, pieces.peaks, pieces.sums, top_ids, top_logprobs),
            {"N": top, "PIECES": count, "PIECE_LANES": power_of_two(count), "LANES": power_of_two(count * top)},
            num_warps=8,
        ),
    ]
