"""Exchanges the nodes of a model for those of our library. Weights stay in their file: only the graph is read."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from python_backends.runtime.kernels.attention_fusion import exchange_attention
from python_backends.runtime.kernels.fusion import fuse_layers
from python_backends.runtime.kernels.graph import DOMAIN, Graph, Matrix


def rewrite(path: Path, threads: int, *, attention: bool = False) -> tuple[bytes, int]:
    """The model with its quantized products exchanged, and how many they were.

    Its initializers still name the weight file relative to ``path``: a session made from the bytes needs
    ``session.model_external_initializers_file_folder_path``.

    Args:
        path: the model; external weights are not read.
        threads: intra-op threads of the session.
        attention: exchange the attentions, too, where products are exchanged.
    """
    model = onnx.load(str(path), load_external_data=False)
    exchanged = exchange(model.graph, threads)
    if exchanged and attention:
        exchange_attention(Graph(model.graph), threads)
    if exchanged:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return model.SerializeToString(), exchanged


def exchange(graph: onnx.GraphProto, threads: int) -> int:
    """Whole layers where the graph has them, then the products that are left; returns the number of products."""
    exchanged = fuse_layers(Graph(graph), threads)
    constants = {initializer.name for initializer in graph.initializer}
    for node in graph.node:
        matrix = Matrix.of(node, constants)
        if matrix is not None:
            _exchange_product(node, matrix, threads)
            exchanged += 1
    return exchanged


def _exchange_product(node: onnx.NodeProto, matrix: Matrix, threads: int) -> None:
    del node.attribute[:]
    node.attribute.extend(matrix.attributes(""))
    node.attribute.append(helper.make_attribute("threads", threads))
    inputs = [node.input[0], *matrix.inputs, matrix.bias]
    while not inputs[-1]:
        inputs.pop()
    del node.input[:]
    node.input.extend(inputs)
    node.op_type, node.domain = "QuantizedMatMul", DOMAIN
