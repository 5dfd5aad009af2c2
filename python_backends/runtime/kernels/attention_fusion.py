"""Exchanges GroupQueryAttention over float16 caches, and the Cast behind it, for `wicore.CachedAttention`.

ONNX Runtime's operator is made for many tokens; ours for decode steps on few cores, too: a step's queries read the
caches once, and no thread is woken for less work than waking it takes. The pattern is that of
`builders.graph.attention`.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from python_backends.runtime.kernels.graph import DOMAIN, Graph

_UNUSED = range(7, 16)
"""Inputs for rotation, positions, bias, sinks, scales of quantized caches and norms, none of which is offered."""
_QUERY_LEN = 16
_KNOWN = {"num_heads", "kv_num_heads", "scale", "local_window_size", "sliding_window_cache"}


def exchange_attention(graph: Graph, threads: int) -> int:
    """Replaces every attention that matches; returns how many."""
    halves = {value.name for value in graph.proto.input if value.type.tensor_type.elem_type == int(TensorProto.FLOAT16)}
    exchanged = 0
    for node in [node for node in graph.proto.node if node.op_type == "GroupQueryAttention"]:
        cast = graph.only_consumer(node.output[0], "Cast")
        values = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if cast is None or not _fits(node, values, halves):
            continue
        if {item.name: item.i for item in cast.attribute}.get("to") != int(TensorProto.FLOAT):
            continue
        inputs = [*node.input[:6], node.input[_QUERY_LEN]]
        fused = helper.make_node(
            "CachedAttention",
            inputs,
            [cast.output[0], *node.output[1:3]],
            name=node.name,
            domain=DOMAIN,
            heads=values["num_heads"],
            kv_heads=values["kv_num_heads"],
            window=values.get("local_window_size", 0),
            scale=float(values["scale"]),
            threads=threads,
        )
        index = next(i for i, other in enumerate(graph.proto.node) if other is node)
        graph.proto.node.remove(node)
        graph.proto.node.insert(index, fused)
        graph.proto.node.remove(cast)
        exchanged += 1
    return exchanged


def _fits(node: onnx.NodeProto, values: dict[str, object], halves: set[str]) -> bool:
    if set(values) - _KNOWN or "scale" not in values or len(node.input) != _QUERY_LEN + 1 or len(node.output) != 3:
        return False
    windowed = "local_window_size" in values
    return (
        windowed == bool(values.get("sliding_window_cache", 0))
        and set(node.input[3:5]) <= halves
        and not any(node.input[i] for i in _UNUSED)
    )
