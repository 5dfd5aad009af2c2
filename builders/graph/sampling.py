"""The next token from the logits, inside the graph: greedy, or drawn from the filtered distribution."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from builders.graph.writer import GraphWriter, Value


def sample(graph: GraphWriter, logits: Value, *, next_token: str, logprob: str) -> None:
    """Draw one token for every row of ``logits`` [B, R, V] float32.

    Reads the graph inputs ``temperature``, ``top_k``, ``top_p``, ``min_p`` [B] and ``uniform`` [B, R] and writes the
    outputs ``next_token`` [B, R] int32 and ``logprob`` [B, R] float32: the token's log-probability in the model's own
    distribution, before temperature and filters. A row depends on nothing but its own logits and parameters.
    """
    last = graph.ints(-1)
    peak, best = graph.ops("TopK", logits, graph.ints(1), outputs=2, axis=-1)  # the lowest id among equals
    greedy = graph.cast(best, TensorProto.FLOAT)  # exact: ids stay far below 2²⁴
    random_rows = graph.op("Greater", "temperature", graph.constant(0, np.float32))
    any_random = graph.cast(
        graph.op("ReduceMax", graph.cast(random_rows, TensorProto.INT32), keepdims=0), TensorProto.BOOL
    )
    (chosen,) = graph.branch(
        any_random,
        lambda branch: [_draw(branch, logits, peak, greedy, random_rows)],
        lambda branch: [greedy],
    )
    token = graph.cast(chosen, TensorProto.INT64)
    graph.op("Cast", graph.op("Squeeze", token, last), outputs=[next_token], to=TensorProto.INT32)
    of_token = graph.op("GatherElements", graph.op("LogSoftmax", logits, axis=-1), token, axis=-1)
    graph.op("Squeeze", of_token, last, outputs=[logprob])


def _draw(graph: GraphWriter, logits: Value, peak: Value, greedy: Value, random_rows: Value) -> Value:
    """[B, R, 1] ids as float32: drawn where ``random_rows``, else greedy.

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
    drawn = graph.cast(graph.op("GatherElements", ids, index, axis=-1), TensorProto.FLOAT)
    return graph.op("Where", per_row(random_rows), drawn, greedy)


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
