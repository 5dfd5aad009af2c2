"""One token a row, drawn from what top-k, top-p and min-p leave of the distribution at a temperature.

The definition is that of the CPU's graph (`builders.graph.sampling`): tokens in falling order of probability, the lower
id first among equals; every filter keeps a prefix of them; the token is where a given uniform number falls in the
cumulative sum of what is left. Nothing is sorted but what lies around the places that decide.

Distances, masses and places are those of `ranking`. Sums of masses are exact in any order, so neither the batch nor the
timing of programs changes what is drawn. `tally_kernel` adds up counts and masses by distance, in bins. `draw_kernel`
finds, for top-k, top-p and the draw in turn, the bin in which the wanted count or mass is reached, collects the tokens
of that bin, sorts them, and finds the token.
"""

from __future__ import annotations

from dataclasses import dataclass

from python_backends.runtime.gpu.kernels.choice import PIECE
from python_backends.runtime.gpu.kernels.lang import cdiv, jit, power_of_two, tl
from python_backends.runtime.gpu.kernels.ranking import (
    FARTHEST,
    NEXT,
    NOWHERE,
    WHOLE,
    ascending,
    distance_from,
    distance_of,
    mass_of,
    place_at,
)
from python_backends.runtime.gpu.launch import Device, Launch, Tensor

BINS = 4096
"""Of distance, each `_BINS_PER_UNIT`⁻¹ wide; tokens beyond hold next to nothing of a peaked distribution."""
LIST = 1024
"""Tokens that are sorted at once."""
_CHUNK = 8192
"""Tokens that the draw's program looks at in one go."""
_BINS_PER_UNIT = tl.constexpr(256.0)


@jit
def peak_of(bests, row, PIECES: tl.constexpr, LANES: tl.constexpr):
    """The largest logit that is drawn from."""
    lanes = tl.arange(0, LANES)
    return tl.max(tl.load(bests + row * PIECES + lanes, mask=lanes < PIECES, other=-float("inf")), 0)


@jit
def tally_kernel(
    logits,
    bests,
    targets,
    temperature,
    min_p,
    counts,
    masses,
    totals,
    V: tl.constexpr,
    R: tl.constexpr,
    BINS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid (pieces, rows): counts and masses of the bins; mass of all tokens, and of those that min-p keeps."""
    row = tl.program_id(1)
    heat = tl.load(temperature + row // R)
    if (heat <= 0) | (tl.load(targets + row) >= 0):
        return
    ids = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    values = tl.load(logits + row.to(tl.int64) * V + ids, mask=ids < V, other=-float("inf"))
    distance = distance_from(peak_of(bests, row, PIECES, LANES), values, heat)
    mass = mass_of(distance)
    tl.atomic_add(totals + 2 * row, tl.sum(mass, 0), sem="relaxed")
    kept = tl.exp(-distance) >= tl.load(min_p + row // R)
    tl.atomic_add(totals + 2 * row + 1, tl.sum(tl.where(kept, mass, 0), 0), sem="relaxed")
    scaled = distance * _BINS_PER_UNIT
    inside = scaled < BINS
    at = row * BINS + tl.where(inside, scaled, 0.0).to(tl.int32)
    tl.atomic_add(counts + at, 1, mask=inside, sem="relaxed")
    tl.atomic_add(masses + at, mass, mask=inside, sem="relaxed")


@jit
def measure(source, first, last, V: tl.constexpr, CHUNK: tl.constexpr):
    """(count, mass) of the tokens at the places first … last − 1."""
    logits, peak, heat, _, _ = source
    count = first * 0
    mass = first * 0
    for start in range(0, V, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        values = tl.load(logits + ids, mask=ids < V, other=-float("inf"))
        distance = distance_from(peak, values, heat)
        place = place_at(distance) + ids
        inside = (place >= first) & (place < last) & (ids < V)
        count += tl.sum(inside.to(tl.int64), 0)
        mass += tl.sum(tl.where(inside, mass_of(distance), 0), 0)
    return count, mass


@jit
def collect(source, first, last, EXACTLY: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, LIST: tl.constexpr):
    """Write the ids of the tokens at the places first … last − 1 to the list, in any order; returns how many.

    Unless ``EXACTLY``, by differences of logits, with room for what the division by the temperature may round: a few
    too many.
    """
    logits, peak, heat, cursor, found = source
    near = distance_of(first) * heat * (1 - 1e-6)
    far = distance_of(last + NEXT) * heat * (1 + 1e-6)
    for start in range(0, V, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        values = tl.load(logits + ids, mask=ids < V, other=-float("inf"))
        if EXACTLY:
            place = place_at(distance_from(peak, values, heat)) + ids
            inside = (place >= first) & (place < last) & (ids < V)
        else:
            difference = peak - values
            inside = (difference >= near) & (difference <= far) & (ids < V)
        index = tl.atomic_add(cursor + ids * 0, 1, mask=inside, sem="relaxed")
        tl.store(found + index, ids, mask=inside & (index < LIST))
    tl.debug_barrier()
    return tl.atomic_xchg(cursor, 0)


@jit
def around(
    goal,
    by_count,
    source,
    counts_to,
    masses_to,
    V: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    LIST: tl.constexpr,
    LIST_BITS: tl.constexpr,
):
    """The tokens around the one at which the count or mass of all up to it first is ``goal``.

    All tokens up to its bin where they fit into the list, those of its bin alone where only these do, and where not
    even they do, as many as fit, after halving the places again and again.

    Returns:
        (places, sorted, [LIST], `NOWHERE` behind the last; count and mass of the tokens before them)
    """
    index = tl.sum((tl.where(by_count, counts_to, masses_to) < goal).to(tl.int32), 0)
    first = place_at(index / _BINS_PER_UNIT)
    last = place_at(tl.where(index < BINS, (index + 1) / _BINS_PER_UNIT, FARTHEST))
    bins = tl.arange(0, BINS)
    through = tl.sum(tl.where(bins == index, counts_to, 0), 0)
    count = tl.sum(tl.where(bins == index - 1, counts_to, 0), 0)
    mass = tl.sum(tl.where(bins == index - 1, masses_to, 0), 0)
    if (index < BINS) & (through <= LIST // 2):
        first *= 0
        count *= 0
        mass *= 0
    number = collect(source, first, last, False, V, CHUNK, LIST)
    if number > LIST:
        inside, _ = measure(source, first, last, V, CHUNK)
        while inside > LIST:
            middle = (first + last) // 2
            lower_count, lower_mass = measure(source, first, middle, V, CHUNK)
            lower = tl.where(by_count, count + lower_count, mass + lower_mass) >= goal
            inside = tl.where(lower, lower_count, inside - lower_count)
            last = tl.where(lower, middle, last)
            first = tl.where(lower, first, middle)
            count += tl.where(lower, 0, lower_count)
            mass += tl.where(lower, 0, lower_mass)
        number = collect(source, first, last, True, V, CHUNK, LIST)
    logits, peak, heat, _, found = source
    lanes = tl.arange(0, LIST)
    ids = tl.load(found + lanes, mask=lanes < number, other=0, cache_modifier=".cg")
    values = tl.load(logits + ids, mask=lanes < number, other=-float("inf"))
    places = place_at(distance_from(peak, values, heat)) + ids
    inside_list = (lanes < number) & (places >= first) & (places < last)
    places = ascending(tl.where(inside_list, places, NOWHERE), LIST, LIST_BITS)
    tl.debug_barrier()  # before the list is written to again
    return places, count, mass


@jit
def reach(
    goal,
    by_count,
    places,
    count,
    mass,
    source,
    counts_to,
    masses_to,
    V: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    LIST: tl.constexpr,
    LIST_BITS: tl.constexpr,
):
    """The token at which the count or mass of all up to it first is ``goal``; the last of any mass if none does.

    Args:
        goal: at least 1.
        by_count: count or mass.
        places: sorted tokens that were collected before, with the ``count`` and ``mass`` of those before them.
        source: (the row's logits, the largest of them, temperature, cursor and list of `collect`).
        counts_to: tokens up to the end of each bin.
        masses_to: their masses.

    Returns:
        (its id; mass of all up to it; places, count and mass for the next time)
    """
    size = tl.sum((places < NOWHERE).to(tl.int64), 0)
    listed = tl.sum(mass_of(distance_of(places)), 0)
    known = (goal > tl.where(by_count, count, mass)) & (goal <= tl.where(by_count, count + size, mass + listed))
    if known == 0:
        places, count, mass = around(goal, by_count, source, counts_to, masses_to, V, BINS, CHUNK, LIST, LIST_BITS)
    lanes = tl.arange(0, LIST)
    real = places < NOWHERE
    up_to = mass + tl.cumsum(mass_of(distance_of(places)), 0)
    before = tl.where(by_count, count + lanes + 1, up_to) < goal
    index = tl.minimum(tl.sum((before & real).to(tl.int32), 0), tl.sum(real.to(tl.int32), 0) - 1)
    place = tl.sum(tl.where(lanes == index, places, 0), 0)
    reached = tl.where(index < 0, mass, tl.sum(tl.where(lanes == index, up_to, 0), 0))
    return place & (NEXT - 1), reached, places, count, mass


@jit
def draw_kernel(
    logits,
    bests,
    targets,
    temperature,
    top_k,
    top_p,
    uniform,
    counts,
    masses,
    totals,
    cursors,
    lists,
    drawn,
    V: tl.constexpr,
    R: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    LIST: tl.constexpr,
    LIST_BITS: tl.constexpr,
    PIECES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid (rows). Leaves counts, masses and totals at zero."""
    row = tl.program_id(0)
    heat = tl.load(temperature + row // R)
    if (heat <= 0) | (tl.load(targets + row) >= 0):
        return
    bins = row * BINS + tl.arange(0, BINS)
    counts_to = tl.cumsum(tl.load(counts + bins).to(tl.int64), 0)
    masses_to = tl.cumsum(tl.load(masses + bins), 0)
    kept = tl.load(totals + 2 * row)
    min_kept = tl.load(totals + 2 * row + 1)
    peak = peak_of(bests, row, PIECES, LANES)
    source = (logits + row.to(tl.int64) * V, peak, heat, cursors + row, lists + row * LIST)
    places = tl.full([LIST], NOWHERE, tl.int64)
    count = kept * 0
    mass = kept * 0
    token = kept * 0
    k = tl.load(top_k + row // R).to(tl.int64)
    p = tl.load(top_p + row // R).to(tl.float64)
    u = tl.load(uniform + row).to(tl.float64)
    for stage in range(3):  # top-k, top-p, the draw: one after the other, compiled once
        if stage == 0:
            goal = k
        elif stage == 1:
            # Kept while the tokens above hold less than top_p of what top-k left; the first always is.
            goal = tl.minimum(tl.maximum(tl.ceil(p * kept.to(tl.float64)).to(tl.int64), 1), kept)
        else:
            # Every filter keeps a prefix, so the lightest one is what all of them keep; the first token is in each.
            kept = tl.minimum(kept, tl.maximum(min_kept, WHOLE))
            goal = tl.minimum((u * kept.to(tl.float64)).to(tl.int64) + 1, kept)
        if (stage == 2) | ((stage == 1) & (p < 1)) | ((stage == 0) & (k > 0) & (k < V)):
            token, kept, places, count, mass = reach(
                goal, stage == 0, places, count, mass, source, counts_to, masses_to, V, BINS, CHUNK, LIST, LIST_BITS
            )
    tl.store(drawn + row, tl.minimum(token, V - 1).to(tl.int32))
    tl.store(counts + bins, tl.zeros([BINS], tl.int32))
    tl.store(masses + bins, tl.zeros([BINS], tl.int64))
    tl.store(totals + 2 * row, tl.zeros_like(kept))
    tl.store(totals + 2 * row + 1, tl.zeros_like(kept))


@dataclass(frozen=True)
class Scratch:
    """Between the kernels. All but the lists must be zero before, and are after."""

    counts: Tensor
    masses: Tensor
    totals: Tensor
    cursors: Tensor
    lists: Tensor
    drawn: Tensor

    @classmethod
    def allocate(cls, device: Device, rows: int, list_size: int = LIST) -> Scratch:
        """For ``rows`` rows of logits and lists of ``list_size`` tokens, a power of two."""
        scratch = cls(
            device.allocate("i32", rows, BINS),
            device.allocate("i64", rows, BINS),
            device.allocate("i64", rows, 2),
            device.allocate("i32", rows),
            device.allocate("i32", rows, list_size),
            device.allocate("i32", rows),
        )
        for tensor in (scratch.counts, scratch.masses, scratch.totals, scratch.cursors):
            device.fill_zero(tensor)
        return scratch


@dataclass(frozen=True)
class Filters:
    """Parameters of B rows and R positions; their meaning is that of `python_backends.runtime.base.StepInputs`."""

    temperature: Tensor
    """float32 [B]; rows with 0 draw nothing."""
    top_k: Tensor
    """int32 [B]"""
    top_p: Tensor
    """float32 [B]"""
    min_p: Tensor
    """float32 [B]"""
    uniform: Tensor
    """float32 [B, R]"""


def draw(logits: Tensor, bests: Tensor, targets: Tensor, filters: Filters, scratch: Scratch) -> list[Launch]:
    """Draw a token into ``scratch.drawn`` for every row with a temperature and no target.

    Args:
        logits: float32 [B·R, V] after adjustments and masks.
        bests: float32 [B·R, pieces], the largest of each `PIECE` of them.
        targets: int32 [B, R] tokens that are given, −1 where one is to be drawn.
        filters: what is kept of the distribution.
        scratch: for at least as many rows.
    """
    rows, vocab_size = logits.shape
    pieces = cdiv(vocab_size, PIECE)
    sizes = {"V": vocab_size, "R": targets.shape[1], "BINS": BINS, "PIECES": pieces, "LANES": power_of_two(pieces)}
    size = scratch.lists.shape[1]
    tables = scratch.counts, scratch.masses, scratch.totals
    return [
        Launch(
            "sampling.tally_kernel",
            (pieces, rows, 1),
            (logits, bests, targets, filters.temperature, filters.min_p, *tables),
            {**sizes, "PIECE": PIECE},
            num_warps=8,
        ),
        Launch(
            "sampling.draw_kernel",
            (rows, 1, 1),
            (
                *(logits, bests, targets, filters.temperature, filters.top_k, filters.top_p, filters.uniform),
                *(*tables, scratch.cursors, scratch.lists, scratch.drawn),
            ),
            {
                **sizes,
                "CHUNK": min(_CHUNK, max(512, power_of_two(vocab_size))),
                "LIST": size,
                "LIST_BITS": size.bit_length() - 1,
            },
            num_warps=16,
        ),
    ]
