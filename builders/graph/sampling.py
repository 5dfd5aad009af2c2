"""The next token from the logits, inside the graph: greedy, drawn from the filtered distribution, or given.

What only some steps need (adjusted logits, masks, draws, the most likely tokens) lies in branches: a greedy step reads
the logits twice, for the largest and for the log-probability, and copies nothing.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from builders.graph.writer import Dim, GraphWriter, Value

INPUTS: tuple[tuple[str, int, tuple[Dim, ...]], ...] = (
    ("temperature", TensorProto.FLOAT, ("B",)),
    ("top_k", TensorProto.INT32, ("B",)),
    ("top_p", TensorProto.FLOAT, ("B",)),
    ("min_p", TensorProto.FLOAT, ("B",)),
    ("uniform", TensorProto.FLOAT, ("B", "R")),
    ("targets", TensorProto.INT32, ("B", "R")),
    ("adjust_ids", TensorProto.INT32, ("B", "P")),
    ("adjust_factor", TensorProto.FLOAT, ("B", "P")),
    ("adjust_bias", TensorProto.FLOAT, ("B", "P")),
    ("token_mask", TensorProto.INT32, ("B", "R", "words")),
    ("top_n", TensorProto.INT64, (1,)),
)
"""Graph inputs, with the meaning of `python_backends.runtime.base.StepInputs`. P or words may be 0: nothing to do."""

OUTPUTS: tuple[tuple[str, int, tuple[Dim, ...]], ...] = (
    ("next_token", TensorProto.INT32, ("B", "R")),
    ("logprob", TensorProto.FLOAT, ("B", "R")),
    ("top_ids", TensorProto.INT32, ("B", "R", "top_n")),
    ("top_logprobs", TensorProto.FLOAT, ("B", "R", "top_n")),
)
"""Graph outputs, those of `StepOutputs`. With ``top_n`` 0 the last two are empty, of another shape."""

_WORD = 32
_GROUP = 512
_EXCLUDED = float(np.finfo(np.float32).min)
"""The logit of a masked token: as good as −∞, but a difference of two is a number."""


def sample(graph: GraphWriter, logits: Value, vocab_size: int) -> None:
    """Choose one token for every row of ``logits`` [B, R, V] float32; declares `INPUTS` and `OUTPUTS`.

    In this order: the listed adjustments, the mask, temperature, top-k, top-p, min-p, the draw. The log-probabilities
    are the model's own, before all of that. A row depends on nothing but its own logits and parameters.
    """
    for name, dtype, shape in INPUTS:
        graph.input(name, dtype, shape)
    last, zero = graph.ints(-1), graph.constant(0, np.int32)
    changes = graph.op("Add", graph.op("Size", "adjust_ids"), graph.op("Size", "token_mask"))
    (chosen,) = graph.branch(
        graph.cast(changes, TensorProto.BOOL),
        lambda branch: [_choose(branch, _changed(branch, logits, vocab_size), vocab_size)],
        lambda branch: [_choose(branch, logits, vocab_size)],
        TensorProto.INT64,
    )
    targets = graph.op("Unsqueeze", "targets", last)
    given = graph.op("GreaterOrEqual", targets, zero)
    token = graph.op("Where", given, graph.cast(targets, TensorProto.INT64), chosen)
    graph.op("Cast", graph.op("Squeeze", token, last), outputs=["next_token"], to=TensorProto.INT32)
    logprobs = graph.op("LogSoftmax", logits, axis=-1)
    graph.op("Squeeze", graph.op("GatherElements", logprobs, token, axis=-1), last, outputs=["logprob"])
    _most_likely(graph, logprobs)
    for name, dtype, shape in OUTPUTS:
        graph.output(name, dtype, shape)


def _most_likely(graph: GraphWriter, logprobs: Value) -> None:
    """The outputs ``top_ids`` and ``top_logprobs``."""

    def found(branch: GraphWriter) -> list[Value]:
        values, ids = branch.ops("TopK", logprobs, "top_n", outputs=2, axis=-1)
        return [branch.cast(ids, TensorProto.INT32), values]

    def nothing(branch: GraphWriter) -> list[Value]:
        empty = np.zeros((0, 0, 0))
        return [branch.constant(empty, np.int32), branch.constant(empty, np.float32)]

    wanted = graph.op("Squeeze", graph.cast("top_n", TensorProto.BOOL))
    dtypes = TensorProto.INT32, TensorProto.FLOAT
    graph.branch(wanted, found, nothing, dtypes, outputs=["top_ids", "top_logprobs"])


# --- what changes logits before the draw --------------------------------------------------------------------------


def _changed(graph: GraphWriter, logits: Value, vocab_size: int) -> Value:
    """The logits [B, R, V] after adjustments and mask, of which one may be absent."""
    adjusted = _adjusted(graph, logits)
    (masked,) = graph.branch(
        graph.cast(graph.op("Size", "token_mask"), TensorProto.BOOL),
        lambda branch: [_masked(branch, adjusted, vocab_size)],
        lambda branch: [adjusted],
    )
    return masked


def _adjusted(graph: GraphWriter, logits: Value) -> Value:
    """``logit' = (logit > 0 ? logit / factor : logit · factor) + bias`` for the listed ids.

    Padding repeats the entry with the row's largest id (in a row of padding only: id 0, unchanged), so that equal
    indices scatter equal values and their order does not matter.
    """
    zero, axis = graph.constant(0, np.int32), graph.ints(1)
    # One more column of padding, so that no row is empty.
    column = graph.op("Concat", graph.op("Shape", "adjust_ids", start=0, end=1), axis, axis=0)
    ids, factor, bias = (
        graph.op("Concat", name, graph.op("Expand", graph.constant(value, dtype), column), axis=1)
        for name, value, dtype in (
            ("adjust_ids", -1, np.int32),
            ("adjust_factor", 1, np.float32),
            ("adjust_bias", 0, np.float32),
        )
    )
    padding = graph.op("Less", ids, zero)
    largest = graph.op("ArgMax", ids, axis=1)
    only_padding = graph.op("Less", graph.op("GatherElements", ids, largest, axis=1), zero)

    def filled(value: Value, neutral: Value) -> Value:
        repeated = graph.op("Where", only_padding, neutral, graph.op("GatherElements", value, largest, axis=1))
        return graph.op("Where", padding, repeated, value)

    index = graph.cast(graph.op("Unsqueeze", filled(ids, zero), axis), TensorProto.INT64)
    factor = graph.op("Unsqueeze", filled(factor, graph.constant(1, np.float32)), axis)
    bias = graph.op("Unsqueeze", filled(bias, graph.constant(0, np.float32)), axis)
    every_position = graph.op("Concat", graph.ints(1), graph.op("Shape", logits, start=1, end=2), graph.ints(1), axis=0)
    index = graph.op("Expand", index, every_position)

    old = graph.op("GatherElements", logits, index, axis=2)
    positive = graph.op("Greater", old, graph.constant(0, np.float32))
    scaled = graph.op("Where", positive, graph.op("Div", old, factor), graph.op("Mul", old, factor))
    return graph.op("ScatterElements", logits, index, graph.op("Add", scaled, bias), axis=2)


def _masked(graph: GraphWriter, logits: Value, vocab_size: int) -> Value:
    """The logits of tokens whose bit in ``token_mask`` is not set, replaced by the lowest number."""
    bits = graph.constant(np.left_shift(np.uint32(1), np.arange(_WORD, dtype=np.uint32)).view(np.int32), np.int32)
    words = graph.op("Unsqueeze", "token_mask", graph.ints(3))
    allowed = graph.cast(graph.op("BitwiseAnd", words, bits), TensorProto.BOOL)
    allowed = graph.reshape(allowed, graph.ints(0, 0, -1))
    if vocab_size % _WORD:
        allowed = graph.op("Slice", allowed, graph.ints(0), graph.ints(vocab_size), graph.ints(2))
    return graph.op("Where", allowed, logits, graph.constant(_EXCLUDED, np.float32))


# --- the draw -----------------------------------------------------------------------------------------------------


def _choose(graph: GraphWriter, logits: Value, vocab_size: int) -> Value:
    """[B, R, 1] int64 ids: the most likely, or drawn where a row has a temperature."""
    peak, best = _largest(graph, logits, vocab_size)
    random_rows = graph.op("Greater", "temperature", graph.constant(0, np.float32))
    any_random = graph.cast(
        graph.op("ReduceMax", graph.cast(random_rows, TensorProto.INT32), keepdims=0), TensorProto.BOOL
    )
    (chosen,) = graph.branch(
        any_random,
        lambda branch: [_draw(branch, logits, peak, best, random_rows)],
        lambda branch: [best],
        TensorProto.INT64,
    )
    return chosen


def _largest(graph: GraphWriter, logits: Value, vocab_size: int) -> tuple[Value, Value]:
    """(largest logit, the lowest id that has it), both [B, R, 1].

    The largest of each group of ids, then of the groups, then the place in that group: a quarter of the time of TopK
    or ArgMax over the whole vocabulary, which are not vectorised.
    """
    last = graph.ints(-1)
    size = min(_GROUP, vocab_size & -vocab_size)
    grouped = graph.reshape(logits, graph.ints(0, 0, -1, size))
    highest = graph.op("ReduceMax", grouped, last, keepdims=0)
    group = graph.op("ArgMax", highest, axis=-1)
    place = graph.op("ArgMax", graph.op("GatherND", grouped, group, batch_dims=2), axis=-1)
    best = graph.op("Add", graph.op("Mul", group, graph.constant(size, np.int64)), place)
    return graph.op("ReduceMax", highest, last), best


def _draw(graph: GraphWriter, logits: Value, peak: Value, best: Value, random_rows: Value) -> Value:
    """[B, R, 1] ids: drawn where ``random_rows``, else ``best``.

    The filters are transformers' logits processors in their order (temperature, top-k, top-p, min-p). Each keeps a
    prefix of the tokens sorted by descending logit, so the draw is the inverse of one cumulative sum. Where every
    random row has a top-k, only the largest of them is sorted: a tenth of a millisecond instead of twenty.
    """
    zero, one = graph.constant(0, np.float32), graph.constant(1, np.float32)
    row_axes = graph.ints(1, 2)

    def per_row(value: Value) -> Value:
        return graph.op("Unsqueeze", value, row_axes)

    vocabulary = graph.op("Shape", logits, start=2, end=3)
    unlimited = graph.op("LessOrEqual", "top_k", graph.constant(0, np.int32))
    top_k = graph.op("Where", unlimited, vocabulary, graph.cast("top_k", TensorProto.INT64))
    top_k = graph.op("Min", top_k, vocabulary)
    wanted = graph.op("Where", random_rows, top_k, graph.ints(1))
    count = graph.op("ReduceMax", wanted, keepdims=1)

    # Less the largest logit before the division: no temperature, however small, makes an infinity of it.
    temperature = graph.op("Where", random_rows, "temperature", one)
    scaled = graph.op("Div", graph.op("Sub", logits, peak), per_row(temperature))
    values, ids = graph.ops("TopK", scaled, count, outputs=2, axis=-1)
    weights = graph.op("Exp", values)

    rank = graph.op("Range", graph.constant(0, np.int64), graph.op("Squeeze", count), graph.constant(1, np.int64))
    within_k = graph.op("Less", rank, per_row(top_k))
    weights = graph.op("Where", within_k, weights, zero)
    before, total = _mass(graph, weights)
    # Kept while the tokens above hold less than top_p of what top-k left; the first always is.
    within_p = graph.op("Less", before, graph.op("Mul", per_row(_double(graph, "top_p")), total))
    first = graph.op("Equal", rank, graph.constant(0, np.int64))
    within_p = graph.op("Or", within_p, first)
    within_min = graph.op("GreaterOrEqual", weights, per_row("min_p"))
    kept = graph.op("And", graph.op("And", within_k, within_p), within_min)
    weights = graph.op("Where", kept, weights, zero)
    before, total = _mass(graph, weights)

    uniform = graph.op("Unsqueeze", _double(graph, "uniform"), graph.ints(2))
    # The drawn token is the last kept one whose predecessors hold at most uniform · total.
    reached = graph.op("And", kept, graph.op("LessOrEqual", before, graph.op("Mul", uniform, total)))
    index = graph.op(
        "Sub",
        graph.op("ReduceSum", graph.cast(reached, TensorProto.INT64), graph.ints(-1), keepdims=1),
        graph.constant(1, np.int64),
    )
    return graph.op("Where", per_row(random_rows), graph.op("GatherElements", ids, index, axis=-1), best)


def _double(graph: GraphWriter, value: Value) -> Value:
    return graph.cast(value, TensorProto.DOUBLE)


def _mass(graph: GraphWriter, weights: Value) -> tuple[Value, Value]:
    """(mass of the tokens before each one, mass of all), both float64.

    The total is the last partial sum, never a separate reduction: zeros behind the kept tokens then change no bit, and
    a row draws the same token whatever the other rows' top-k.
    """
    wide = _double(graph, weights)
    before = graph.op("CumSum", wide, graph.constant(2, np.int32), exclusive=1)
    last = graph.ints(-1), graph.ints(np.iinfo(np.int64).max), graph.ints(-1)
    return before, graph.op("Add", graph.op("Slice", before, *last), graph.op("Slice", wide, *last))
