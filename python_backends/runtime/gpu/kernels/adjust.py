"""Logits as tokens are drawn from them: after a request's adjustments and a grammar's mask.

The model's own logits stay, since log-probabilities are reported from them.
"""

from __future__ import annotations

from python_backends.runtime.gpu.kernels.lang import cdiv, jit, power_of_two, tl
from python_backends.runtime.gpu.launch import Launch, Tensor

_PIECE = 4096
_EXCLUDED = tl.constexpr(-3.4028234663852886e38)
"""The logit of a masked token: as good as −∞, but a difference of two is a number."""


@jit
def allowed(token_mask, row, ids, inside, WORDS: tl.constexpr):
    """Whether the mask's bit of each id is set."""
    words = tl.load(token_mask + row * WORDS + ids // 32, mask=inside, other=0)
    return ((words >> (ids % 32)) & 1) != 0


@jit
def mask_kernel(logits, token_mask, output, V: tl.constexpr, WORDS: tl.constexpr, PIECE: tl.constexpr):
    """Grid (pieces, rows): a copy, without the tokens that the mask excludes."""
    row = tl.program_id(1)
    ids = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    inside = ids < V
    at = row.to(tl.int64) * V + ids
    values = tl.load(logits + at, mask=inside, other=0.0)
    if token_mask is not None:
        values = tl.where(allowed(token_mask, row, ids, inside, WORDS), values, _EXCLUDED)
    tl.store(output + at, values, mask=inside)


@jit
def scatter_kernel(
    logits,
    adjust_ids,
    adjust_factor,
    adjust_bias,
    token_mask,
    output,
    V: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    WORDS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid (P / LANES, rows): the listed tokens' logits, scaled and shifted, unless the mask excludes them."""
    row = tl.program_id(1)
    lanes = tl.program_id(0) * LANES + tl.arange(0, LANES)
    listed = row // R * P + lanes
    ids = tl.load(adjust_ids + listed, mask=lanes < P, other=-1)
    inside = ids >= 0
    factor = tl.load(adjust_factor + listed, mask=inside, other=1.0)
    bias = tl.load(adjust_bias + listed, mask=inside, other=0.0)
    at = row.to(tl.int64) * V + ids
    old = tl.load(logits + at, mask=inside, other=0.0)
    new = tl.where(old > 0, tl.div_rn(old, factor), old * factor) + bias
    if token_mask is not None:
        inside = inside & allowed(token_mask, row, ids, inside, WORDS)
    tl.store(output + at, new, mask=inside)


def adjust(
    logits: Tensor,
    output: Tensor,
    wanted: int,
    *,
    adjust_ids: Tensor | None = None,
    adjust_factor: Tensor | None = None,
    adjust_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> list[Launch]:
    """``logit' = (logit > 0 ? logit / factor : logit · factor) + bias`` for the listed ids, then the mask.

    Args:
        logits: float32 [B·R, V].
        output: float32 [B·R, V], other memory.
        wanted: R.
        adjust_ids: int32 [B, P] distinct ids of a row, −1 for padding; None for no adjustments.
        adjust_factor: float32 [B, P], with ``adjust_ids``.
        adjust_bias: float32 [B, P], with ``adjust_ids``.
        token_mask: int32 [B, R, ceil(V / 32)], bit i % 32 of word i // 32 set where token i may be drawn; or None.
    """
    rows, vocab_size = logits.shape
    sizes = {"V": vocab_size, "WORDS": cdiv(vocab_size, 32)}
    grid = (cdiv(vocab_size, _PIECE), rows, 1)
    launches = [Launch("adjust.mask_kernel", grid, (logits, token_mask, output), {**sizes, "PIECE": _PIECE})]
    if adjust_ids is not None:
        count = adjust_ids.shape[1]
        lanes = min(256, power_of_two(count))
        launches.append(
            Launch(
                "adjust.scatter_kernel",
                (cdiv(count, lanes), rows, 1),
                (logits, adjust_ids, adjust_factor, adjust_bias, token_mask, output),
                {**sizes, "R": wanted, "P": count, "LANES": lanes},
                num_warps=1,
            )
        )
    return launches
