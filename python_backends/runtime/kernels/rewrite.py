"""Exchanges the nodes of a model for those of our library. Weights stay in their file: only the graph is read."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

DOMAIN = "wicore"
_BLOCKS = (32, 64, 128, 256)
_BIAS, _GROUP_INDEX = 5, 4


def rewrite(path: Path, threads: int) -> tuple[bytes, int]:
    """The model with its MatMulNBits nodes exchanged, and how many they were.

    Its initializers still name the weight file relative to ``path``: a session made from the bytes needs
    ``session.model_external_initializers_file_folder_path``.

    Args:
        path: the model; external weights are not read.
        threads: intra-op threads of the session.
    """
    model = onnx.load(str(path), load_external_data=False)
    constants = {initializer.name for initializer in model.graph.initializer}
    exchanged = 0
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and _fits(node, constants):
            _exchange(node, threads)
            exchanged += 1
    if exchanged:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return model.SerializeToString(), exchanged


def _fits(node: onnx.NodeProto, constants: set[str]) -> bool:
    attributes = _attributes(node)
    inputs = list(node.input)
    return (
        attributes.get("bits", 4) in (4, 8)
        and attributes["block_size"] in _BLOCKS
        # Level 4 allows activations in int8; the lower ones ask for more.
        and attributes.get("accuracy_level", 0) == 4
        and not any(inputs[_GROUP_INDEX : _GROUP_INDEX + 1])
        and all(name in constants for name in inputs[1:] if name)
    )


def _exchange(node: onnx.NodeProto, threads: int) -> None:
    attributes, inputs = _attributes(node), list(node.input)
    inputs += [""] * (_BIAS + 1 - len(inputs))
    del node.input[:], node.attribute[:]
    node.input.extend([*inputs[:4], inputs[_BIAS]])
    while not node.input[-1]:
        del node.input[-1]
    node.op_type, node.domain = "QuantizedMatMul", DOMAIN
    for name in ("K", "N", "bits", "block_size"):
        node.attribute.append(helper.make_attribute(name, attributes.get(name, 4)))
    node.attribute.append(helper.make_attribute("threads", threads))


def _attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}
