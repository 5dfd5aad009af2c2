"""Finds what lies between a layer's packed projection and its attention: `wicore.DecoderLayerToHeads`.

The projection is cut into query, key and value; query and key are normed head by head and rotated; all three are
rounded to float16. The pattern is that of `builders.graph.decoder`.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from python_backends.runtime.kernels.graph import Graph, Norm


@dataclass
class Heads:
    """See `Heads` in src/heads.h for what they compute."""

    heads: int
    kv_heads: int
    cosine: str
    sine: str
    query_gamma: str
    key_gamma: str
    outputs: tuple[str, str, str]
    """Query, key and value in float16."""
    replaced: list[onnx.NodeProto]

    def attributes(self) -> list[onnx.AttributeProto]:
        """As the op wants them."""
        return [helper.make_attribute("heads", self.heads), helper.make_attribute("kv_heads", self.kv_heads)]


@dataclass
class _Rotated:
    """Query or key from the Split on: normed by head, rotated, in float16."""

    norm: Norm
    heads: int
    angles: tuple[str, str]
    out: str
    nodes: list[onnx.NodeProto]


def match_heads(graph: Graph, packed: str, width: int, epsilon: float) -> Heads | None:
    """The heads of a projection of ``width`` columns; None where something differs or another node sees a value."""
    flat = graph.only_consumer(packed, "Reshape")
    split = graph.only_consumer(flat.output[0], "Split") if flat is not None else None
    if flat is None or split is None or len(split.output) != 3 or _attributes(split).get("axis") != 2:
        return None
    sizes = graph.integers(split.input[1]) if len(split.input) > 1 else None
    query, key = (_match_rotated(graph, name, epsilon) for name in split.output[:2])
    cast = graph.only_consumer(split.output[2], "Cast")
    if query is None or key is None or cast is None or not _is_half(cast) or query.angles != key.angles:
        return None
    dims = {graph.length(part.norm.gamma) for part in (query, key)}
    dim = dims.pop()
    wanted = [query.heads * dim, key.heads * dim, key.heads * dim]
    if dims or dim % 2 or sizes != wanted or sum(wanted) != width:
        return None
    return Heads(
        query.heads,
        key.heads,
        *query.angles,
        query.norm.gamma,
        key.norm.gamma,
        (query.out, key.out, cast.output[0]),
        [flat, split, *query.nodes, *key.nodes, cast],
    )


def _match_rotated(graph: Graph, name: str, epsilon: float) -> _Rotated | None:
    by_head = graph.only_consumer(name, "Reshape")
    norm_node = graph.only_consumer(by_head.output[0], "RMSNormalization") if by_head is not None else None
    norm = Norm.of(norm_node, graph)
    by_row = graph.only_consumer(norm.out, "Reshape") if norm is not None else None
    rotation = graph.only_consumer(by_row.output[0], "RotaryEmbedding") if by_row is not None else None
    cast = graph.only_consumer(rotation.output[0], "Cast") if rotation is not None else None
    if by_head is None or norm is None or by_row is None or rotation is None or cast is None:
        return None
    attributes = _attributes(rotation)
    plain = not attributes.get("interleaved") and not attributes.get("rotary_embedding_dim") and not rotation.domain
    if norm.epsilon != epsilon or not plain or len(rotation.input) != 3 or not _is_half(cast):
        return None
    angles = (rotation.input[1], rotation.input[2])
    nodes = [by_head, norm.node, by_row, rotation, cast]
    return _Rotated(norm, attributes.get("num_heads", 0), angles, cast.output[0], nodes)


def _is_half(cast: onnx.NodeProto) -> bool:
    return _attributes(cast).get("to") == int(TensorProto.FLOAT16)


def _attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}
