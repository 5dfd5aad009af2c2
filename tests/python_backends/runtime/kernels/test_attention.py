"""Our attention over float16 caches against GroupQueryAttention's: the same results, and caches equal bit for bit."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from python_backends.runtime.kernels.attention_fusion import exchange_attention
from python_backends.runtime.kernels.graph import Graph
from tests.python_backends.runtime.kernels.products import OPSETS

DIM = 32


class Sequences:
    """Rows of caches, chunk after chunk through one operator."""

    def __init__(self, compiled, *, ours, rows, heads=4, kv_heads=2, capacity=48, window=0, threads=2):
        self.heads, self.kv_heads, self.rows = heads, kv_heads, rows
        self.caches = [np.zeros((rows, kv_heads, capacity, DIM), np.float16) for _ in range(2)]
        self.past = np.zeros(rows, np.int32)
        self._session = _session(compiled, ours, heads, kv_heads, capacity, window, threads)

    def step(self, query, key, value, counts):
        """[B, S, heads · dim] float32 of a right-padded chunk with ``counts`` valid tokens a row."""
        counts = np.asarray(counts, np.int32)
        total = np.where(counts > 0, self.past + counts, 1).astype(np.int32)
        out = np.empty(query.shape, np.float32)
        binding = self._session.io_binding()
        feeds = {"q": query, "k": key, "v": value, "last": total - 1, "count": counts}
        feeds["bound"] = np.array(max(int(total.max()), query.shape[1]), np.int32)
        feeds |= {"pk": self.caches[0], "pv": self.caches[1]}
        for name, array in feeds.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in {"out": out, "nk": self.caches[0], "nv": self.caches[1]}.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        self.past = self.past + counts
        return out


def _session(compiled, ours, heads, kv_heads, capacity, window, threads):
    extra = {"local_window_size": window, "sliding_window_cache": 1} if window else {}
    inputs = ["q", "k", "v", "pk", "pv", "last", "bound", *[""] * 9, "count"]
    nodes = [
        helper.make_node(
            *("GroupQueryAttention", inputs, ["half", "nk", "nv"]),
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=1.0,
            **extra,
        ),
        helper.make_node("Cast", ["half"], ["out"], to=TensorProto.FLOAT),
    ]
    half, cache = TensorProto.FLOAT16, ["B", kv_heads, capacity, DIM]
    shapes = {"q": ["B", "S", heads * DIM], "k": ["B", "S", kv_heads * DIM], "v": ["B", "S", kv_heads * DIM]}
    values = [helper.make_tensor_value_info(name, half, shape) for name, shape in shapes.items()]
    values += [helper.make_tensor_value_info(name, half, cache) for name in ("pk", "pv")]
    values += [helper.make_tensor_value_info(name, TensorProto.INT32, ["B"]) for name in ("last", "count")]
    values += [helper.make_tensor_value_info("bound", TensorProto.INT32, [])]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, shapes["q"])]
    outputs += [helper.make_tensor_value_info(name, half, cache) for name in ("nk", "nv")]
    graph = helper.make_graph(nodes, "attention", values, outputs)
    if ours:
        assert exchange_attention(Graph(graph), threads) == 1
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*one) for one in OPSETS], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.register_custom_ops_library(str(compiled))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def chunk(rng, rows, length, heads, kv_heads):
    sizes = (heads, kv_heads, kv_heads)
    return tuple(rng.normal(size=(rows, length, count * DIM)).astype(np.float16) for count in sizes)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from(((4, 1), (4, 2), (2, 2), (6, 2))),
    window=st.sampled_from((0, 1, 5, 16)),
    spare=st.integers(0, 20),
    rows=st.integers(1, 3),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
)
def test_chunks_of_any_length_give_the_same_results_and_the_same_caches(
    compiled, groups, window, spare, rows, threads, seed, lengths
):
    rng = np.random.default_rng(seed)
    capacity = window + spare if window else sum(lengths) + 1
    capacity = max(capacity, 2)
    settings = {"rows": rows, "heads": groups[0], "kv_heads": groups[1], "capacity": capacity, "window": window}
    ours = Sequences(compiled, ours=True, threads=threads, **settings)
    stock = Sequences(compiled, ours=False, threads=threads, **settings)
    stride = capacity - window + 1
    for length in lengths:
        parts = chunk(rng, rows, length, *groups)
        counts = rng.integers(0, length + 1, rows)
        found, wanted = ours.step(*parts, counts), stock.step(*parts, counts)
        for row, count in enumerate(counts):
            np.testing.assert_allclose(found[row, :count], wanted[row, :count], rtol=2e-3, atol=2e-3)
            assert not found[row, count:].any()
            total = int(ours.past[row])
            live = total - max(0, -(-(total - capacity) // stride)) * stride if window else total
            for mine, theirs in zip(ours.caches, stock.caches, strict=True):
                np.testing.assert_array_equal(mine[row, :, :live], theirs[row, :, :live])


@pytest.mark.parametrize("window", [0, 7])
def test_a_token_gets_the_same_bits_however_it_is_cut_into_chunks_and_whatever_shares_its_step(compiled, window):
    rng = np.random.default_rng(0)
    query, key, value = chunk(rng, 3, 37, 4, 2)
    settings = {"capacity": 12 if window else 48, "window": window}
    whole = Sequences(compiled, ours=True, rows=3, **settings).step(query, key, value, [37, 37, 37])
    for row in range(3):
        alone = Sequences(compiled, ours=True, rows=1, threads=1, **settings)
        at = 0
        for length in (1, 5, 1, 1, 20, 9):
            part = (slice(row, row + 1), slice(at, at + length))
            out = alone.step(*(np.ascontiguousarray(values[part]) for values in (query, key, value)), [length])
            np.testing.assert_array_equal(out[0], whole[row, at : at + length])
            at += length


def test_other_attentions_stay_as_they_are():
    def exchanged(**changes):
        values = {"num_heads": 4, "kv_num_heads": 2, "scale": 1.0} | changes.pop("attributes", {})
        inputs = ["q", "k", "v", "pk", "pv", "last", "bound", *[""] * 9, "count"]
        for index, name in changes.pop("inputs", {}).items():
            inputs[index] = name
        node = helper.make_node("GroupQueryAttention", inputs, ["half", "nk", "nv"], domain="com.microsoft", **values)
        cast = helper.make_node("Cast", ["half"], ["out"], to=changes.pop("to", TensorProto.FLOAT))
        kind = changes.pop("cache", TensorProto.FLOAT16)
        caches = [helper.make_tensor_value_info(name, kind, None) for name in ("pk", "pv")]
        return exchange_attention(Graph(onnx.GraphProto(node=[node, cast], input=caches)), 1)

    assert exchanged() == 1
    assert exchanged(attributes={"local_window_size": 4, "sliding_window_cache": 1}) == 1
    assert exchanged(attributes={"local_window_size": 4}) == 0
    assert exchanged(attributes={"do_rotary": 1}) == 0
    assert exchanged(attributes={"softcap": 30.0}) == 0
    assert exchanged(inputs={10: "bias"}) == 0
    assert exchanged(inputs={14: "norm"}) == 0
    assert exchanged(to=TensorProto.FLOAT16) == 0
    assert exchanged(cache=TensorProto.FLOAT) == 0
