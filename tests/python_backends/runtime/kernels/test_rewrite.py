"""Which nodes are exchanged, and that a model computes the same after it."""

import logging

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from builders.quantize import Precision
from python_backends import config
from python_backends.errors import ConfigError, InternalError
from python_backends.runtime.kernels import loading as module
from python_backends.runtime.kernels.graph import DOMAIN
from python_backends.runtime.kernels.loading import accelerate
from python_backends.runtime.kernels.rewrite import exchange, rewrite
from tests.checkpoints import tiny
from tests.driver import artefacts
from tests.python_backends.runtime.kernels.products import Weight, graph_of, session_of

WIDTH, HEADS, HIDDEN, DIM = 96, 64, 192, 40


def heads_of(rng, packed, epsilon):
    """The nodes from a packed projection to attention, their constants, inputs and outputs: three heads over one."""
    sizes = {"by_row": [0, 0, -1], "by_head": [0, 0, -1, DIM], "sizes": [3 * DIM, DIM, DIM]}
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in sizes.items()]
    constants.append(numpy_helper.from_array(np.array([1, -1, 5 * DIM], np.int64), "rows"))
    nodes = [
        helper.make_node("Reshape", [packed, "rows"], ["rows_of_packed"]),
        helper.make_node("Split", ["rows_of_packed", "sizes"], ["query", "key", "value"], axis=2),
    ]
    for name, count in (("query", 3), ("key", 1)):
        gamma = rng.normal(1, 0.3, DIM).astype(np.float32)
        constants.append(numpy_helper.from_array(gamma, f"{name}.gamma"))
        nodes += [
            helper.make_node("Reshape", [name, "by_head"], [f"{name}.heads"]),
            helper.make_node(
                "RMSNormalization", [f"{name}.heads", f"{name}.gamma"], [f"{name}.normed"], axis=-1, epsilon=epsilon
            ),
            helper.make_node("Reshape", [f"{name}.normed", "by_row"], [f"{name}.row"]),
            helper.make_node("RotaryEmbedding", [f"{name}.row", "cos", "sin"], [f"{name}.turned"], num_heads=count),
            helper.make_node("Cast", [f"{name}.turned"], [f"{name}.half"], to=10),
        ]
    nodes.append(helper.make_node("Cast", ["value"], ["value.half"], to=10))
    inputs = {name: [1, "T", DIM // 2] for name in ("cos", "sin")}
    return nodes, constants, inputs, {f"{name}.half": [1, "T", None] for name in ("query", "key", "value")}


def layer(rng, *, epsilon=1e-6, front=True, end=True, heads=False, block=32, bits=4):
    """The nodes between two attentions, as the decoder's builder writes them."""
    weights = {
        "out": Weight.random(rng, WIDTH, HEADS, 8, block),
        "gate_up": Weight.random(rng, 2 * HIDDEN, WIDTH, bits, block, asymmetric=True, scale=0.05),
        "down": Weight.random(rng, WIDTH, HIDDEN, bits, min(block, 64), scale=0.05),
        "next": Weight.random(rng, 5 * DIM, WIDTH, 8, block),
    }
    gammas = ("attention", "gate", "down", "next")
    constants = [item for name, weight in weights.items() for item in weight.initializers(name)]
    constants += [numpy_helper.from_array(rng.normal(1, 0.3, WIDTH).astype(np.float32), f"{g}.gamma") for g in gammas]

    def norm(x, name, out):
        return helper.make_node("RMSNormalization", [x, f"{name}.gamma"], [out], axis=-1, epsilon=epsilon)

    nodes, stream = [], "stream"
    if front:
        nodes += [
            weights["out"].node("attention", "out", "projected"),
            norm("projected", "attention", "projected_normed"),
            helper.make_node("Add", ["stream", "projected_normed"], ["middle"]),
        ]
        stream = "middle"
    nodes += [
        norm(stream, "gate", "normed"),
        weights["gate_up"].node("normed", "gate_up", "packed"),
        helper.make_node("Split", ["packed"], ["gate", "up"], axis=1, num_outputs=2),
        helper.make_node("Gelu", ["gate"], ["activated"], approximate="tanh"),
        helper.make_node("Mul", ["activated", "up"], ["gated"]),
        weights["down"].node("gated", "down", "fed"),
        norm("fed", "down", "fed_normed"),
        helper.make_node("Add", [stream, "fed_normed"], ["out"]),
    ]
    outputs = {"out": ["T", WIDTH]}
    if end:
        nodes += [norm("out", "next", "next_normed"), weights["next"].node("next_normed", "next", "qkv")]
        outputs["qkv"] = ["T", 5 * DIM]
    inputs = {"stream": ["T", WIDTH]} | ({"attention": ["T", HEADS]} if front else {})
    if heads:
        more = heads_of(rng, "qkv", epsilon)
        nodes, constants, inputs = nodes + more[0], constants + more[1], inputs | more[2]
        outputs = {"out": outputs["out"]} | more[3]
    return graph_of(nodes, inputs, outputs, constants, halves=more[3] if heads else ())


def feeds_of(session, rng, rows):
    return {
        value.name: rng.normal(size=[rows if dim == "T" else dim for dim in value.shape]).astype(np.float32)
        for value in session.get_inputs()
    }


@pytest.mark.parametrize("rows", [1, 7, 30, 100, 600])
@pytest.mark.parametrize(
    ("front", "end", "heads"),
    [(True, True, True), (False, True, True), (True, True, False), (True, False, False), (False, False, False)],
)
def test_a_fused_layer_computes_what_its_nodes_do(compiled, rows, front, end, heads):
    rng = np.random.default_rng(rows)
    graph = layer(rng, front=front, end=end, heads=heads)
    fused, exchanged = session_of(graph, compiled)
    plain, _ = session_of(graph, compiled, ours=False)
    assert exchanged == 2 + front + end
    feeds = feeds_of(plain, rng, rows)
    for ours, stock in zip(fused.run(None, feeds), plain.run(None, feeds), strict=True):
        assert ours.dtype == stock.dtype
        assert ours.shape == stock.shape
        assert np.linalg.norm(ours - stock) < 0.03 * np.linalg.norm(stock)


def test_rows_of_a_fused_layer_are_bitwise_their_own_up_to_80_rows(compiled):
    rng = np.random.default_rng(0)
    session, _ = session_of(layer(rng, block=64, heads=True), compiled)
    feeds = feeds_of(session, rng, 80)
    alone = [session.run(None, {name: rows_of(value, i, i + 1) for name, value in feeds.items()}) for i in range(80)]
    for count in (2, 8, 9, 33, 80):
        together = session.run(None, {name: rows_of(value, 0, count) for name, value in feeds.items()})
        for output, value in enumerate(together):
            singles = [single[output] for single in alone[:count]]
            np.testing.assert_array_equal(value, np.concatenate(singles, axis=value.ndim - 2))


def rows_of(value, start, stop):
    return value[..., start:stop, :]


def test_heads_that_another_node_sees_stay_nodes(compiled):
    rng = np.random.default_rng(6)
    graph = layer(rng, heads=True)
    graph.output.append(helper.make_tensor_value_info("query.turned", 1, [1, "T", 3 * DIM]))
    session, _ = session_of(graph, compiled)
    plain, _ = session_of(graph, compiled, ours=False)
    exchange(graph, 2)
    assert [node.op_type for node in graph.node].count("DecoderLayer") == 1
    feeds = feeds_of(plain, rng, 3)
    for ours, stock in zip(session.run(None, feeds), plain.run(None, feeds), strict=True):
        assert np.linalg.norm(ours - stock) < 0.03 * np.linalg.norm(stock)


def change(graph, what):
    """Something small that the fused node could not express."""
    by_type = {node.op_type: node for node in graph.node}
    if what == "another epsilon":
        by_type["RMSNormalization"].attribute[1].f = 1e-3
        return
    if what == "exact gelu":
        by_type["Gelu"].attribute[0].s = b"none"
    if what == "branches swapped":
        by_type["Gelu"].input[0], by_type["Mul"].input[1] = "up", "gate"
    if what == "gated value is an output":
        graph.output.append(helper.make_tensor_value_info("gated", 1, ["T", HIDDEN]))
    if what == "a value is taken twice":
        graph.node.append(helper.make_node("Identity", ["normed"], ["copy"]))
        graph.output.append(helper.make_tensor_value_info("copy", 1, ["T", WIDTH]))


@pytest.mark.parametrize(
    "what",
    ["exact gelu", "branches swapped", "gated value is an output", "a value is taken twice"],
)
def test_a_layer_that_differs_is_left_as_nodes_whose_products_are_exchanged(compiled, what):
    rng = np.random.default_rng(1)
    graph = layer(rng)
    change(graph, what)
    copy = onnx.GraphProto()
    copy.CopyFrom(graph)
    assert exchange(copy, 2) == 4
    types = [node.op_type for node in copy.node]
    assert types.count("QuantizedMatMul") == 4
    assert "DecoderLayer" not in types
    session, _ = session_of(graph, compiled)
    plain, _ = session_of(graph, compiled, ours=False)
    feeds = feeds_of(plain, rng, 5)
    for ours, stock in zip(session.run(None, feeds), plain.run(None, feeds), strict=True):
        assert np.linalg.norm(ours - stock) < 0.03 * np.linalg.norm(stock)


def test_a_norm_of_another_epsilon_stays_outside_the_fused_node():
    graph = layer(np.random.default_rng(2))
    change(graph, "another epsilon")
    exchange(graph, 2)
    types = [node.op_type for node in graph.node]
    assert types.count("DecoderLayer") == 1
    assert types.count("QuantizedMatMul") == 1
    assert types.count("RMSNormalization") == 1


@pytest.mark.parametrize(("level", "block"), [(0, 32), (1, 32), (4, 16)])
def test_products_that_ask_for_more_stay_with_onnx_runtime(level, block):
    weight = Weight.random(np.random.default_rng(3), 40, 64, block=block)
    node = weight.node("x", "w", "y", level=level)
    graph = graph_of([node], {"x": ["M", 64]}, {"y": ["M", 40]}, weight.initializers("w"))
    assert exchange(graph, 2) == 0
    assert graph.node[0].op_type == "MatMulNBits"


@pytest.mark.parametrize("precision", [Precision("int4"), Precision("int8", 128, symmetric=False)])
@pytest.mark.parametrize("family", ["1b", "4b"])
def test_all_layers_of_a_built_decoder_are_fused(family, precision):
    path = artefacts(tiny(family), precision) / "decoder.onnx"
    data, exchanged = rewrite(path, 2)
    nodes = onnx.load_model_from_string(data).graph.node
    types = [node.op_type for node in nodes]
    stock = [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]
    assert exchanged == stock.count("MatMulNBits")
    fused = [name for name in types if name.startswith("DecoderLayer")]
    assert len(fused) == stock.count("Gelu")
    # The last layer has no next one, and a middle one's attention is observed; pictures see query and key before.
    assert fused.count("DecoderLayerToHeads") == (len(fused) - 2 if family == "1b" else 0)
    # What is left: the first layer's projection and the head.
    assert types.count("QuantizedMatMul") == 2


def test_float_models_are_loaded_as_they_are():
    path = artefacts(tiny("1b"), Precision("fp32")) / "decoder.onnx"
    assert accelerate(path, onnxruntime.SessionOptions()) == str(path)


def test_the_configuration_keeps_the_stock_kernels():
    path = artefacts(tiny("1b"), Precision("int4")) / "decoder.onnx"
    assert accelerate(path, onnxruntime.SessionOptions(), "onnxruntime") == str(path)
    with pytest.raises(ConfigError, match="choose one of auto, onnxruntime"):
        config.Config(cpu_kernels="fast")


@pytest.mark.parametrize("reason", ["no compiler", "wrong answers", "an old CPU"])
def test_without_a_library_that_works_the_stock_kernels_run(monkeypatch, caplog, reason):
    def fail(*_):
        raise InternalError(reason)

    if reason == "an old CPU":
        monkeypatch.setattr(module.cpu, "flags", lambda: frozenset(("sse4_2", "f16c")))
    else:
        monkeypatch.setattr(module, "library" if reason == "no compiler" else "check", fail)
    module._checked_library.cache_clear()
    path = artefacts(tiny("1b"), Precision("int4")) / "decoder.onnx"
    with caplog.at_level(logging.INFO):
        assert accelerate(path, onnxruntime.SessionOptions()) == str(path)
    module._checked_library.cache_clear()
    assert "ONNX Runtime's" in caplog.text
    assert ("lacks avx2, fma" if reason == "an old CPU" else reason) in caplog.text
    assert DOMAIN not in caplog.text
