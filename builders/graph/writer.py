"""Assembly of one ONNX graph: nodes are appended in order, weights go to the model's external data file.

Every method that adds something returns the name of the resulting value, so that a network reads as a sequence of
assignments. Branches of an ``If`` are writers of their own that see the values of the graph around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper

from builders.checkpoint import LazyTensor
from builders.tensors import row_chunks
from builders.weights import WeightFile
from python_backends.errors import InternalError

OPSET = 23
"""RMSNormalization, RotaryEmbedding and Attention are standard operators from here on."""
STANDARD_OPSET = 24
"""TensorScatter, which appends to a KV cache, is one from here on."""
IR_VERSION = 11
CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

Dim = int | str
Value = str
"""Name of a tensor in the graph."""


class GraphWriter:
    """Nodes, constants, inputs and outputs of one graph."""

    def __init__(
        self, weights: WeightFile | None = None, parent: GraphWriter | None = None, *, opset: int = OPSET
    ) -> None:
        """``weights`` may be left out where every weight is a graph input."""
        self._weights = weights
        self._opset = opset
        self._root: GraphWriter = parent._root if parent else self
        self._domains: set[str] = set()
        self._nodes: list[onnx.NodeProto] = []
        self._produced: set[Value] = set()
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._count = 0

    # --- values -----------------------------------------------------------------------------------------------

    @property
    def weights(self) -> WeightFile:
        """Where weights go.

        Raises:
            InternalError: the graph has no weights of its own.
        """
        if self._weights is None:
            raise InternalError("this graph has no weight file")
        return self._weights

    def fresh(self, hint: str) -> Value:
        """A name nothing else in the model has."""
        self._root._count += 1
        return f"{hint}_{self._root._count}"

    def input(self, name: str, dtype: int, shape: Sequence[Dim]) -> Value:
        """Declare a graph input; strings in ``shape`` are dynamic dimensions."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: Value, dtype: int, shape: Sequence[Dim]) -> None:
        """Declare ``value`` as a graph output; its name is the output's."""
        self._outputs.append(helper.make_tensor_value_info(value, dtype, shape))

    def rename(self, value: Value, name: Value) -> Value:
        """Give a value of this graph the name of an output, without a node for it."""
        for node in self._nodes:
            for names in (node.input, node.output):
                for index, found in enumerate(names):
                    if found == value:
                        names[index] = name
        return name

    def constant(self, values: ArrayLike, dtype: Any) -> Value:
        """A small constant, stored in the model file itself and once however often it is asked for."""
        root = self._root
        array = np.asarray(values, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in root._constants:
            root._constants[key] = root.fresh("constant")
            root._initializers.append(numpy_helper.from_array(array, root._constants[key]))
        return root._constants[key]

    def ints(self, *values: int) -> Value:
        """A one-dimensional int64 constant: axes, shapes, slice bounds."""
        return self.constant(values, np.int64)

    def weight(self, name: str, tensor: LazyTensor, dtype: int = TensorProto.FLOAT) -> Value:
        """A weight of the checkpoint as it stands, streamed to the weight file as ``dtype``."""
        numpy_dtype = helper.tensor_dtype_to_np_dtype(dtype)
        chunks = (tensor.read(start, stop).astype(numpy_dtype) for start, stop in row_chunks(tensor))
        return self.stored(self.weights.add(name, dtype, tensor.shape, chunks))

    def stored(self, tensor: TensorProto) -> Value:
        """A tensor that already lies in the weight file."""
        self._root._initializers.append(tensor)
        return str(tensor.name)

    # --- nodes ------------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: Value, domain: str = "", outputs: Sequence[str] = (), **attributes: Any) -> Value:
        """Append a node with one output and return it. An input "" is an optional one left out."""
        return self.ops(kind, *inputs, domain=domain, outputs=outputs or [self.fresh(kind)], **attributes)[0]

    def ops(
        self, kind: str, *inputs: Value, domain: str = "", outputs: Sequence[str] | int, **attributes: Any
    ) -> list[Value]:
        """Append a node with several outputs, given by name or by number."""
        names = [self.fresh(kind) for _ in range(outputs)] if isinstance(outputs, int) else list(outputs)
        node = helper.make_node(kind, list(inputs), names, name=f"{kind}:{names[0]}", domain=domain, **attributes)
        self._nodes.append(node)
        self._root._domains.add(domain)
        self._produced.update(names)
        return names

    def cast(self, value: Value, dtype: int) -> Value:
        """``value`` as another element type."""
        return self.op("Cast", value, to=dtype)

    def reshape(self, value: Value, shape: Value) -> Value:
        """``value`` in another shape, given as an int64 value; 0 keeps a dimension."""
        return self.op("Reshape", value, shape)

    def branch(
        self,
        condition: Value,
        then: Callable[[GraphWriter], Sequence[Value]],
        otherwise: Callable[[GraphWriter], Sequence[Value]],
        dtypes: int | Sequence[int] = TensorProto.FLOAT,
        *,
        outputs: Sequence[str] = (),
    ) -> list[Value]:
        """``If(condition)``: each callable fills a writer of its own and returns its values, of types ``dtypes``."""
        kinds = [dtypes] if isinstance(dtypes, int) else dtypes
        graphs = []
        for name, fill in (("then", then), ("else", otherwise)):
            writer = GraphWriter(self._weights, parent=self)
            for value, kind in zip(fill(writer), kinds, strict=True):
                # A branch returns a value of the graph around it only through a node of its own.
                own = value if value in writer._produced else writer.op("Identity", value)
                writer._outputs.append(helper.make_tensor_value_info(own, kind, None))
            graphs.append(writer._graph(self.fresh(name)))
        names = outputs or len(kinds)
        return self.ops("If", condition, outputs=names, then_branch=graphs[0], else_branch=graphs[1])

    def loop(
        self, count: Value, initial: Value, body: Callable[[GraphWriter, Value, Value], Value], dtype: int
    ) -> Value:
        """``body(writer, index, carried)`` ``count`` times (int64 scalar); returns what the last one carries on."""
        writer = GraphWriter(self._weights, parent=self)
        index, go_on, carried = (self.fresh(name) for name in ("index", "go_on", "carried"))
        writer._inputs += [
            helper.make_tensor_value_info(index, TensorProto.INT64, ()),
            helper.make_tensor_value_info(go_on, TensorProto.BOOL, ()),
            helper.make_tensor_value_info(carried, dtype, None),
        ]
        result = body(writer, index, carried)
        writer._outputs += [
            helper.make_tensor_value_info(writer.op("Identity", go_on), TensorProto.BOOL, ()),
            helper.make_tensor_value_info(result, dtype, None),
        ]
        return self.op("Loop", count, "", initial, body=writer._graph(self.fresh("body")))

    # --- files ------------------------------------------------------------------------------------------------

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write the model; its weights lie in the weight file beside it."""
        opsets = [helper.make_opsetid("", self._opset)]
        opsets += [helper.make_opsetid(domain, 1) for domain in sorted(self._domains - {""})]
        model = helper.make_model(self._graph(path.stem), opset_imports=opsets, ir_version=IR_VERSION)
        model.producer_name = "wicore"
        helper.set_model_props(model, metadata or {})
        path.write_bytes(model.SerializeToString())

    def _graph(self, name: str) -> onnx.GraphProto:
        return helper.make_graph(self._nodes, name, self._inputs, self._outputs, self._initializers)
