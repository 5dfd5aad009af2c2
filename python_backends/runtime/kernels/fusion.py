"""Finds what lies between the attentions of Gemma-3's decoder and makes it one node, `wicore.DecoderLayer`.

Every parallel node wakes the other threads, which costs tens of microseconds, and writes its result to memory for the
next one to read. The pattern is that of `builders.graph.decoder`, from the output projection of one attention to the
query, key and value projection of the next; both ends may be missing. Whatever does not match stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import helper

from python_backends.runtime.kernels.graph import DOMAIN, Graph, Matrix, Norm
from python_backends.runtime.kernels.head_fusion import Heads, match_heads


@dataclass
class _Layer:
    """The parts of one layer; see `wicore.DecoderLayer` in src/layer_op.h for what they compute."""

    stream: str
    gate_norm: Norm
    gate_up: Matrix
    down: Matrix
    down_norm: Norm
    out: str
    last: onnx.NodeProto
    """The node in whose place the new one goes: the last of those that it replaces and that every layer has."""
    replaced: list[onnx.NodeProto]
    attention: str = ""
    out_projection: Matrix | None = None
    attention_norm: Norm | None = None
    next_norm: Norm | None = None
    next_projection: Matrix | None = None
    next_out: str = ""
    heads: Heads | None = None


def fuse_layers(graph: Graph, threads: int) -> int:
    """Replaces every layer that matches; returns the number of quantized products that are in them."""
    products = 0
    for gelu in [node for node in graph.proto.node if node.op_type == "Gelu"]:
        layer = _match(graph, gelu)
        if layer is None:
            continue
        _add_front(graph, layer)
        _add_end(graph, layer)
        _replace(graph.proto, layer, threads)
        products += sum(matrix is not None for matrix in _matrices(layer).values())
    return products


def _match(graph: Graph, gelu: onnx.NodeProto) -> _Layer | None:
    """The feed-forward part around a GELU, which every layer must have."""
    gate = _match_gate(graph, gelu)
    if gate is None:
        return None
    gate_node, split, mul = gate
    down_node = graph.only_consumer(mul.output[0], "MatMulNBits")
    gate_up, down = (Matrix.of(node, graph.constants) for node in (gate_node, down_node))
    gate_norm = Norm.of(graph.producer(gate_node.input[0], "RMSNormalization"), graph)
    if down_node is None or gate_up is None or down is None or gate_norm is None or not _fit(gate_up, down):
        return None
    down_norm = Norm.of(graph.only_consumer(down_node.output[0], "RMSNormalization"), graph)
    add = graph.only_consumer(down_norm.out, "Add") if down_norm is not None else None
    if down_norm is None or add is None or set(add.input) != {gate_norm.x, down_norm.out}:
        return None
    if gate_norm.epsilon != down_norm.epsilon or graph.only_consumer(gate_norm.out, "MatMulNBits") is None:
        return None
    replaced = [gate_norm.node, gate_node, split, gelu, mul, down_node, down_norm.node, add]
    return _Layer(gate_norm.x, gate_norm, gate_up, down, down_norm, add.output[0], add, replaced)


def _match_gate(graph: Graph, gelu: onnx.NodeProto) -> tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto] | None:
    """The product of gate and up, the Split behind it, and the Mul of both branches."""
    approximate = {item.name: item.s for item in gelu.attribute}.get("approximate")
    split = graph.producer(gelu.input[0], "Split")
    mul = graph.only_consumer(gelu.output[0], "Mul")
    if approximate != b"tanh" or split is None or mul is None or len(split.output) != 2:
        return None
    gate_node = graph.producer(split.input[0], "MatMulNBits")
    halves = gelu.input[0] == split.output[0] and set(mul.input) == {gelu.output[0], split.output[1]}
    alone = all(
        graph.only_consumer(name, taker) is not None
        for name, taker in ((split.input[0], "Split"), (split.output[0], "Gelu"), (split.output[1], "Mul"))
    )
    return (gate_node, split, mul) if gate_node is not None and halves and alone else None


def _fit(gate_up: Matrix, down: Matrix) -> bool:
    """Both branches of the first matrix must fill whole panels of 32 columns and whole blocks of the second."""
    branch_fits = gate_up.n == 2 * down.k and down.k % 32 == 0 and down.k % down.block == 0
    return branch_fits and down.n == gate_up.k and not gate_up.bias and not down.bias


def _add_front(graph: Graph, layer: _Layer) -> None:
    """The output projection of the attention before, its norm and the addition that makes the layer's stream."""
    add = graph.producer(layer.stream, "Add")
    takers = graph.consumers(layer.stream)
    if add is None or graph.is_kept(layer.stream) or len(takers) != 2:
        return
    if {id(node) for node in takers} != {id(layer.gate_norm.node), id(layer.last)}:
        return
    for normed, stream in (tuple(add.input), tuple(reversed(add.input))):
        norm = Norm.of(graph.producer(normed, "RMSNormalization"), graph)
        node = graph.producer(norm.x, "MatMulNBits") if norm is not None else None
        matrix = Matrix.of(node, graph.constants)
        if norm is None or node is None or matrix is None or matrix.bias or matrix.n != layer.down.n:
            continue
        if norm.epsilon != layer.gate_norm.epsilon:
            continue
        if graph.only_consumer(norm.x, "RMSNormalization") is None or graph.only_consumer(normed, "Add") is None:
            continue
        layer.stream, layer.attention = stream, node.input[0]
        layer.attention_norm, layer.out_projection = norm, matrix
        layer.replaced += [add, norm.node, node]
        return


def _add_end(graph: Graph, layer: _Layer) -> None:
    """The norm and the projection that begin the next layer."""
    for taker in graph.consumers(layer.out):
        norm = Norm.of(taker, graph)
        node = graph.only_consumer(norm.out, "MatMulNBits") if norm is not None else None
        matrix = Matrix.of(node, graph.constants)
        if norm is None or node is None or matrix is None or matrix.bias or matrix.k != layer.down.n:
            continue
        if norm.epsilon != layer.gate_norm.epsilon:
            continue
        layer.next_norm, layer.next_projection, layer.next_out = norm, matrix, node.output[0]
        layer.replaced += [norm.node, node]
        layer.heads = match_heads(graph, layer.next_out, matrix.n, norm.epsilon)
        if layer.heads is not None:
            layer.replaced += layer.heads.replaced
        return


def _matrices(layer: _Layer) -> dict[str, Matrix | None]:
    return {
        "out_": layer.out_projection,
        "gate_": layer.gate_up,
        "down_": layer.down,
        "next_": layer.next_projection,
    }


_NO_MATRIX = Matrix(0, 0, 4, 32, ("", "", ""), "")


def _replace(graph: onnx.GraphProto, layer: _Layer, threads: int) -> None:
    matrices = {prefix: matrix or _NO_MATRIX for prefix, matrix in _matrices(layer).items()}
    attention_gamma = layer.attention_norm.gamma if layer.attention_norm else ""
    next_gamma = layer.next_norm.gamma if layer.next_norm else ""
    inputs = [layer.stream, layer.attention, *matrices["out_"].inputs, attention_gamma]
    inputs += [layer.gate_norm.gamma, *matrices["gate_"].inputs, *matrices["down_"].inputs, layer.down_norm.gamma]
    inputs += [next_gamma, *matrices["next_"].inputs]
    op_type, outputs = "DecoderLayer", [layer.out, layer.next_out] if layer.next_out else [layer.out]
    if layer.heads is not None:
        inputs += [layer.heads.cosine, layer.heads.sine, layer.heads.query_gamma, layer.heads.key_gamma]
        op_type, outputs = "DecoderLayerToHeads", [layer.out, *layer.heads.outputs]
    while not inputs[-1]:
        inputs.pop()
    fused = helper.make_node(op_type, inputs, outputs, name=layer.last.name, domain=DOMAIN)
    fused.attribute.extend(layer.heads.attributes() if layer.heads is not None else [])
    for prefix, matrix in matrices.items():
        fused.attribute.extend(matrix.attributes(prefix))
    fused.attribute.append(helper.make_attribute("epsilon", layer.gate_norm.epsilon))
    fused.attribute.append(helper.make_attribute("threads", threads))
    # Attention lies between what makes the inputs and this place, and the next attention behind it.
    index = next(i for i, node in enumerate(graph.node) if node is layer.last)
    graph.node.insert(index, fused)
    for node in layer.replaced:
        graph.node.remove(node)
