"""The order of tokens that draws go by: falling probability, the lower id first among equals.

A token's *distance* is (largest logit − its logit) / temperature, its *mass* exp(−distance) as a whole number, and its
*place* distance and id in one number, by which tokens are ordered.
"""

from __future__ import annotations

from python_backends.runtime.gpu.kernels.lang import jit, tl

MAX_VOCABULARY = 1 << 20
WHOLE = tl.constexpr(1 << 44)
"""The mass of the most likely token."""
ID_BITS = tl.constexpr(20)
"""Lowest bits of a place; those of the distance, never negative and so ordered as integers are, lie above."""
NEXT = tl.constexpr(1 << 20)
"""From one distance to the next."""
NOWHERE = tl.constexpr((0x7F800000 << 20) + (1 << 20) - 1)
"""A place behind all tokens of any mass: at an infinite distance."""
FARTHEST = tl.constexpr(32.0)
"""Distance at which a token has no mass."""


@jit
def mass_of(distance):
    """exp(−distance), in units of 2⁻⁴⁴."""
    return (tl.exp(-distance) * (1.0 * WHOLE)).to(tl.int64)


@jit
def distance_from(peak, logits, heat):
    """Of tokens with these logits, as IEEE 754 divides."""
    return tl.div_rn(tl.abs(peak - logits), heat)  # a difference of zeros may be −0


@jit
def place_at(distance):
    """The first place at a distance."""
    return distance.to(tl.int32, bitcast=True).to(tl.int64) << ID_BITS


@jit
def distance_of(place):
    """Of the token at a place."""
    return (place >> ID_BITS).to(tl.int32).to(tl.float32, bitcast=True)


@jit
def ascending(values, SIZE: tl.constexpr, BITS: tl.constexpr):
    """The values [SIZE = 2^BITS], sorted: a bitonic network, without the reductions that `tl.sort` makes of it."""
    lanes = tl.arange(0, SIZE)
    for level in tl.static_range(1, BITS + 1):
        for step in tl.static_range(level):
            other = tl.gather(values, lanes ^ (1 << (level - 1 - step)), 0)
            takes_lower = ((lanes >> (level - 1 - step)) & 1) == ((lanes >> level) & 1)
            values = tl.where(takes_lower, tl.minimum(values, other), tl.maximum(values, other))
    return values
