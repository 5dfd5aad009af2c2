"""Looking around in an ONNX graph."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import onnx
from onnx import helper, numpy_helper

DOMAIN = "wicore"
_BLOCKS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Matrix:
    """The weight [N, K] of a MatMulNBits node that our kernels can multiply with."""

    n: int
    k: int
    bits: int
    block: int
    inputs: tuple[str, str, str]
    """Data, scales, zero points; the last may be empty."""
    bias: str

    @classmethod
    def of(cls, node: onnx.NodeProto | None, constants: set[str]) -> Matrix | None:
        """The matrix of a MatMulNBits node; None where the node wants what our kernels do not do."""
        if node is None or node.op_type != "MatMulNBits":
            return None
        values = {attribute.name: attribute.i for attribute in node.attribute}
        inputs = [*node.input, *[""] * (6 - len(node.input))]
        _, data, scales, zero_points, group_index, bias = inputs
        fits = (
            values.get("bits", 4) in (4, 8)
            and values["block_size"] in _BLOCKS
            and values.get("accuracy_level", 0) == 4  # it allows activations in int8; lower levels ask for more
            and not group_index
            and all(name in constants for name in inputs[1:] if name)
        )
        if not fits:
            return None
        return cls(
            values["N"], values["K"], values.get("bits", 4), values["block_size"], (data, scales, zero_points), bias
        )

    def attributes(self, prefix: str) -> list[onnx.AttributeProto]:
        """As our ops want them, every name behind ``prefix``."""
        values = {"N": self.n, "K": self.k, "bits": self.bits, "block_size": self.block}
        return [helper.make_attribute(prefix + name, value) for name, value in values.items()]


class Graph:
    """Who makes and who takes each value. Not updated when the graph changes."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.proto = graph
        self._initializers = {initializer.name: initializer for initializer in graph.initializer}
        self.constants = set(self._initializers)
        self._producers = {name: node for node in graph.node for name in node.output if name}
        self._consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self._consumers[name].append(node)
        self._kept = {value.name for value in graph.output} | _names_in_subgraphs(graph)

    def is_kept(self, name: str) -> bool:
        """Whether the value is an output of the graph, or seen inside a control flow node."""
        return name in self._kept

    def length(self, name: str) -> int:
        """Elements of a constant."""
        return math.prod(self._initializers[name].dims)

    def integers(self, name: str) -> list[int] | None:
        """The values of a constant that lies in the model itself; None for anything else."""
        tensor = self._initializers.get(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return [int(value) for value in numpy_helper.to_array(tensor).ravel()]

    def producer(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The node of this type that makes the value."""
        node = self._producers.get(name)
        return node if node is not None and node.op_type == op_type else None

    def consumers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that take the value, a node as often as it takes it."""
        return self._consumers[name]

    def only_consumer(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The node that takes the value, where it is the only one, of this type, and nothing else sees the value."""
        nodes = self._consumers[name]
        alone = len(nodes) == 1 and nodes[0].op_type == op_type and name not in self._kept
        return nodes[0] if alone else None


def _names_in_subgraphs(graph: onnx.GraphProto) -> set[str]:
    """Values that the bodies of control flow nodes take, of whatever level."""
    names: set[str] = set()
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                names |= {name for inner in attribute.g.node for name in inner.input}
                names |= {value.name for value in attribute.g.output}
                names |= _names_in_subgraphs(attribute.g)
    return names


@dataclass
class Norm:
    """An RMS norm over the last axis."""

    node: onnx.NodeProto
    x: str
    gamma: str
    out: str
    epsilon: float

    @classmethod
    def of(cls, node: onnx.NodeProto | None, graph: Graph) -> Norm | None:
        """The norm that a node computes; None for any other node."""
        if node is None or node.op_type != "RMSNormalization" or node.input[1] not in graph.constants:
            return None
        values = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if values.get("axis", -1) != -1 or values.get("stash_type", 1) != 1:
            return None
        return cls(node, node.input[0], node.input[1], node.output[0], values.get("epsilon", 1e-5))
