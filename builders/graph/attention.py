"""Attention, the one part of the decoder that runtimes want written differently.

``contrib`` is the dialect of ONNX Runtime: GroupQueryAttention appends to caches that past and present share. Another
dialect is a class with the same two methods.

GroupQueryAttention is causal; the tokens of an image see each other both ways. So the layers of a multimodal model
have a branch, taken only when a chunk holds an image, that computes the image's rows with an explicit mask from the
past as it stands before GroupQueryAttention appends (and, in local layers, evicts).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from builders.checkpoint import TextConfig
from builders.graph.writer import CONTRIB, GraphWriter, Value
from python_backends.errors import BuildError

_MAX_SCORES = 2**24
"""Attention scores held at once by an image branch (64 MB)."""


@dataclass(frozen=True)
class CacheNames:
    """Graph inputs and outputs of one layer's cache, each [B, kv_heads, capacity, head_dim]."""

    past_key: Value
    past_value: Value
    present_key: Value
    present_value: Value

    @staticmethod
    def of(layer: int) -> CacheNames:
        """The names of layer ``layer``."""
        return CacheNames(f"past_key.{layer}", f"past_value.{layer}", f"present_key.{layer}", f"present_value.{layer}")


@dataclass(frozen=True)
class _ImageContext:
    """What the image branches of all layers share; computed once a step."""

    any_image: Value
    """Scalar bool."""
    is_image: Value
    """bool [B, S, 1]"""
    is_valid: Value
    """bool [B, S, 1]: not right padding."""
    past_rows: dict[str, Value]
    """By layer type: int64 [1], rows of the past any slot holds."""
    masks: dict[str, Value]
    """By layer type: bool [B, 1, S, past_rows + S], True where a query sees a key; unset without images."""


class ContribAttention:
    """ONNX Runtime's dialect. Made once per graph; `apply` once per layer.

    Reads the graph inputs ``past_len`` and ``query_len`` [B], and with ``images`` also ``image_index`` and
    ``image_group`` [B, S]. Local layers use window-sized caches in GroupQueryAttention's documented layout.

    One global layer, the middle one, also says which blocks of the context its last query looked at: the output
    ``block_attention``, computed only in steps whose input ``attention_block`` is not 0.
    """

    def __init__(self, graph: GraphWriter, config: TextConfig, *, images: bool, cache_dtype: int) -> None:
        self._graph = graph
        self._config = config
        self._cache_dtype = cache_dtype
        # An idle row may have an empty cache, which the operator refuses; with no query any length leaves it unchanged.
        one, zero = graph.constant(1, np.int32), graph.constant(0, np.int32)
        idle = graph.op("LessOrEqual", "query_len", zero)
        length = graph.op("Where", idle, one, graph.op("Add", "past_len", "query_len"))
        self._last = graph.op("Sub", length, one)
        chunk = graph.cast(graph.op("Shape", "input_ids", start=1, end=2), TensorProto.INT32)
        longest = graph.op("Max", graph.op("ReduceMax", length, keepdims=1), chunk)
        self._bound = graph.op("Squeeze", longest)
        self._images = self._image_context(chunk) if images else None
        if "global" not in config.layer_types:
            raise BuildError("no layer of this model sees the whole context; keep at least the first six of a cut one")
        global_layers = [layer for layer, kind in enumerate(config.layer_types) if kind == "global"]
        self._observed = global_layers[len(global_layers) // 2]

    def apply(self, query: Value, key: Value, value: Value, layer: int) -> Value:
        """One layer's attention: query [B, S, heads·head_dim], key and value [B, S, kv_heads·head_dim] → as query.

        Query and key are normed and rotated, and the query holds the score's scale already, so that float16 scores
        stay in range.
        """
        explicit: Value | None = None
        if self._images is not None:
            # The key passes through the branch, so that it reads the past before the operator below changes it.
            key, explicit = self._image_rows(query, key, value, layer)
        local = self._config.layer_types[layer] == "local"
        window = {"local_window_size": self._config.sliding_window, "sliding_window_cache": 1} if local else {}
        cache = CacheNames.of(layer)
        output, _, _ = self._graph.ops(
            "GroupQueryAttention",
            *(self._as_cache(item) for item in (query, key, value)),
            cache.past_key,
            cache.past_value,
            self._last,
            self._bound,
            *[""] * 7,  # rotary caches, positions, bias, sinks, cache scales
            *[""] * 2,  # query and key norms
            "query_len",
            domain=CONTRIB,
            outputs=[self._graph.fresh("attention"), cache.present_key, cache.present_value],
            num_heads=self._config.num_heads,
            kv_num_heads=self._config.num_kv_heads,
            scale=1.0,
            **window,
        )
        if self._cache_dtype != TensorProto.FLOAT:
            output = self._graph.cast(output, TensorProto.FLOAT)
        if layer == self._observed:
            self._block_attention(query, cache.present_key)
        if self._images is None or explicit is None:
            return output
        return self._graph.op("Where", self._images.is_image, explicit, output)

    def _as_cache(self, value: Value) -> Value:
        return value if self._cache_dtype == TensorProto.FLOAT else self._graph.cast(value, self._cache_dtype)

    def _block_attention(self, query: Value, present_key: Value) -> None:
        """The output [B, blocks]: what the query of the row's last wanted position gives each block, summed over keys,
        averaged over heads.

        That query sees every key before it, also where it ends an image. Fillers stand behind it (`batch.filler`).
        """
        graph, config = self._graph, self._config
        one, zero = graph.constant(1, np.int32), graph.constant(0, np.int32)
        block = graph.input("attention_block", TensorProto.INT64, [1])

        def masses(branch: GraphWriter) -> list[Value]:
            length = branch.op("Max", branch.op("Add", "past_len", "query_len"), one)
            longest = branch.cast(branch.op("ReduceMax", length, keepdims=1), TensorProto.INT64)
            wanted = branch.op("ReduceMax", "logit_positions", branch.ints(1), keepdims=0)
            last = branch.op("Max", branch.op("Min", wanted, branch.op("Sub", "query_len", one)), zero)
            total = branch.op("Add", branch.op("Add", "past_len", last), one)
            row = branch.op("GatherND", query, _column(branch, branch.cast(last, TensorProto.INT64)), batch_dims=1)
            grouped = branch.reshape(row, branch.ints(0, config.num_kv_heads, -1, config.head_dim))
            keys = branch.op("Slice", present_key, branch.ints(0), longest, branch.ints(2))
            if self._cache_dtype != TensorProto.FLOAT:
                keys = branch.cast(keys, TensorProto.FLOAT)
            # Keys first: the queries are the small ones to transpose.
            scores = branch.op("MatMul", keys, branch.op("Transpose", grouped, perm=[0, 1, 3, 2]))
            columns = branch.op("Range", zero, branch.op("Squeeze", branch.cast(longest, TensorProto.INT32)), one)
            seen = branch.op("Unsqueeze", branch.op("Less", columns, _column(branch, total)), branch.ints(1, 3))
            lowest = branch.constant(np.finfo(np.float32).min, np.float32)
            shares = branch.op("Softmax", branch.op("Where", seen, scores, lowest), axis=2)
            by_key = branch.op("ReduceMean", shares, branch.ints(1, 3), keepdims=0)
            return [_sums(branch, by_key, longest, block)]

        def nothing(branch: GraphWriter) -> list[Value]:
            return [branch.constant(np.zeros((1, 0)), np.float32)]

        wanted = graph.op("Squeeze", graph.cast(block, TensorProto.BOOL))
        graph.branch(wanted, masses, nothing, outputs=["block_attention"])
        graph.output("block_attention", TensorProto.FLOAT, ["B", "blocks"])

    # --- images -----------------------------------------------------------------------------------------------

    def _image_context(self, chunk: Value) -> _ImageContext:
        graph = self._graph
        zero = graph.constant(0, np.int32)
        is_image = graph.op("GreaterOrEqual", "image_index", zero)
        any_image = graph.cast(
            graph.op("ReduceMax", graph.cast(is_image, TensorProto.INT32), keepdims=0), TensorProto.BOOL
        )
        offsets = graph.op("Range", zero, graph.op("Squeeze", chunk), graph.constant(1, np.int32))
        is_valid = graph.op("Less", offsets, _column(graph, "query_len"))
        past_rows: dict[str, Value] = {}
        masks: dict[str, Value] = {}
        for kind in sorted(set(self._config.layer_types)):
            resident = self._resident(kind)
            past_rows[kind] = graph.cast(graph.op("ReduceMax", resident, keepdims=1), TensorProto.INT64)
            (masks[kind],) = graph.branch(
                any_image,
                lambda branch, kind=kind, resident=resident: [  # type: ignore[misc]
                    self._mask(branch, kind, resident, offsets=offsets, is_valid=is_valid)
                ],
                lambda branch: [branch.constant(np.zeros((1, 1, 1, 1)), np.bool_)],
                TensorProto.BOOL,
            )
        last = graph.ints(2)
        return _ImageContext(
            any_image,
            graph.op("Unsqueeze", is_image, last),
            graph.op("Unsqueeze", is_valid, last),
            past_rows,
            masks,
        )

    def _resident(self, kind: str) -> Value:
        """int32 [B]: rows of the past a slot's cache holds, a prefix of the buffer."""
        if kind == "global":
            return "past_len"
        graph = self._graph
        # L(T) of the operator's documentation, for capacity C = W + G − 1.
        layer = self._config.layer_types.index("local")
        capacity = graph.cast(graph.op("Shape", f"past_key.{layer}", start=2, end=3), TensorProto.INT32)
        stride = graph.op("Sub", capacity, graph.constant(self._config.sliding_window - 1, np.int32))
        excess = graph.op("Sub", "past_len", capacity)
        steps = graph.op("Div", graph.op("Add", excess, graph.op("Sub", stride, graph.constant(1, np.int32))), stride)
        evicted = graph.op("Mul", graph.op("Max", steps, graph.constant(0, np.int32)), stride)
        return graph.op("Sub", "past_len", evicted)

    def _mask(self, graph: GraphWriter, kind: str, resident: Value, *, offsets: Value, is_valid: Value) -> Value:
        """bool [B, 1, S, past + S]: (causal or same image) and, in local layers, within the window."""
        past_len, zero, one = _column(graph, "past_len"), graph.constant(0, np.int32), graph.constant(1, np.int32)
        columns = graph.op("Range", zero, graph.op("ReduceMax", resident, keepdims=0), one)
        past_valid = graph.op("Less", columns, _column(graph, resident))
        first_position = graph.op("Sub", past_len, _column(graph, resident))
        queries = graph.op("Add", past_len, offsets)  # absolute positions [B, S]
        key_positions = graph.op("Concat", graph.op("Add", first_position, columns), queries, axis=1)
        key_valid = graph.op("Concat", past_valid, is_valid, axis=1)
        query_column = graph.op("Unsqueeze", queries, graph.ints(2))
        key_row = graph.op("Unsqueeze", key_positions, graph.ints(1))
        causal = graph.op("LessOrEqual", key_row, query_column)

        # An image lies wholly in one chunk, so the past holds no token of the chunk's images.
        no_group = graph.op("Expand", graph.constant(-1, np.int32), graph.op("Shape", past_valid))
        groups = graph.op("Concat", no_group, "image_group", axis=1)
        group_column = graph.op("Unsqueeze", "image_group", graph.ints(2))
        same = graph.op("Equal", graph.op("Unsqueeze", groups, graph.ints(1)), group_column)
        same = graph.op("And", same, graph.op("GreaterOrEqual", group_column, zero))
        seen = graph.op("Or", causal, same)
        if kind == "local":
            reach = graph.op("Sub", query_column, graph.constant(self._config.sliding_window, np.int32))
            seen = graph.op("And", seen, graph.op("Greater", key_row, reach))
        seen = graph.op("And", seen, graph.op("Unsqueeze", key_valid, graph.ints(1)))
        return graph.op("Unsqueeze", seen, graph.ints(1))

    def _image_rows(self, query: Value, key: Value, value: Value, layer: int) -> tuple[Value, Value]:
        """(key, attention output of the chunk where it holds an image, else zeros that broadcast)."""
        images = self._images
        assert images is not None
        kind, cache = self._config.layer_types[layer], CacheNames.of(layer)

        def explicit(graph: GraphWriter) -> list[Value]:
            # Padding rows hold whatever the operator left there: zero probability times NaN would spread.
            zero = graph.constant(0, np.float32)
            bounds = graph.ints(0), images.past_rows[kind], graph.ints(2)
            joined = []
            for new, past in ((key, cache.past_key), (value, cache.past_value)):
                kept = graph.op("Where", images.is_valid, new, zero)
                if self._cache_dtype != TensorProto.FLOAT:
                    kept = graph.cast(kept, self._cache_dtype)
                whole = graph.op(
                    "Concat", graph.op("Slice", past, *bounds), _by_head(graph, kept, self._config.head_dim), axis=2
                )
                # Widened last: until then a long past takes half the memory.
                joined.append(whole if self._cache_dtype == TensorProto.FLOAT else graph.cast(whole, TensorProto.FLOAT))
            return [graph.op("Identity", key), self._masked(graph, query, joined[0], joined[1], images.masks[kind])]

        def skipped(graph: GraphWriter) -> list[Value]:
            return [graph.op("Identity", key), graph.constant(np.zeros((1, 1, 1)), np.float32)]

        passed, rows = self._graph.branch(images.any_image, explicit, skipped, [TensorProto.FLOAT] * 2)
        return passed, rows

    def _masked(self, graph: GraphWriter, query: Value, keys: Value, values: Value, mask: Value) -> Value:
        """Attention [B, S, heads·head_dim] under a mask [B, 1, S, T], a few rows at a time.

        The operator holds every score: 27B's 32 heads of a 256-token image would need 4 GB at 128K tokens of past.
        """
        one = graph.constant(1, np.int64)
        length = graph.op("Shape", mask, start=2, end=3)
        per_row = graph.op(
            "Mul", graph.op("Size", graph.op("Slice", mask, *_span(graph, 0, 1, 2))), graph.ints(self._config.num_heads)
        )
        rows = graph.op("Max", graph.op("Div", graph.ints(_MAX_SCORES), per_row), one)
        steps = graph.op("Div", graph.op("Sub", graph.op("Add", length, rows), one), rows)

        def attend(body: GraphWriter, index: Value, done: Value) -> Value:
            start = body.op("Mul", index, rows)
            stop = body.op("Add", start, rows)
            part = body.op("Slice", query, start, stop, body.ints(1))
            output = body.op(
                "Attention",
                _by_head(body, part, self._config.head_dim),
                keys,
                values,
                body.op("Slice", mask, start, stop, body.ints(2)),
                scale=1.0,
            )
            output = body.op("Transpose", output, perm=[0, 2, 1, 3])
            return body.op("Concat", done, body.reshape(output, body.op("Shape", part)), axis=1)

        nothing = graph.op("Slice", query, *_span(graph, 0, 0, 1))
        return graph.loop(graph.op("Squeeze", steps), nothing, attend, TensorProto.FLOAT)


def _sums(graph: GraphWriter, values: Value, length: Value, block: Value) -> Value:
    """[B, T] → [B, ceil(T / block)]: sums of ``block`` neighbours; ``length`` is T, both int64 [1]."""
    missing = graph.op("Mod", graph.op("Sub", block, graph.op("Mod", length, block)), block)
    padding = graph.op("Concat", graph.ints(0, 0, 0), missing, axis=0)
    padded = graph.op("Pad", values, padding, graph.constant(0, np.float32))
    shape = graph.op("Concat", graph.ints(0, -1), block, axis=0)
    return graph.op("ReduceSum", graph.reshape(padded, shape), graph.ints(2), keepdims=0)


def _span(graph: GraphWriter, start: int, stop: int, axis: int) -> tuple[Value, Value, Value]:
    """The last inputs of a Slice."""
    return graph.ints(start), graph.ints(stop), graph.ints(axis)


def _by_head(graph: GraphWriter, value: Value, head_dim: int) -> Value:
    """[B, S, heads·head_dim] → [B, heads, S, head_dim]."""
    return graph.op("Transpose", graph.reshape(value, graph.ints(0, 0, -1, head_dim)), perm=[0, 2, 1, 3])


def _column(graph: GraphWriter, value: Value) -> Value:
    """[B] → [B, 1]."""
    return graph.op("Unsqueeze", value, graph.ints(1))


def encoder_attention(graph: GraphWriter, num_heads: int, query: Value, key: Value, value: Value) -> Value:
    """Attention of an encoder, all [N, L, C] float32; tiled, so that no [L, L] matrix is held."""
    return graph.op("MultiHeadAttention", query, key, value, domain=CONTRIB, num_heads=num_heads)
