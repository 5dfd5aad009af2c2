"""The decoder cut at attention: what lies between two attentions as graphs that serve every layer.

Three pieces, with the tensors that `python_backends.runtime.gpu.program.Products` speaks of (M tokens):

=========  =======================================  =======================================================
piece      data in                                  data out
=========  =======================================  =======================================================
`FIRST`    ``stream`` [M, D]                        ``packed``: q, k, v of the first layer
`BETWEEN`  ``attended`` [M, H·hd], ``stream``       ``next_stream`` [M, D], ``packed`` of the next layer
`LAST`     ``attended``, ``stream``                 ``next_stream`` behind the last layer
=========  =======================================  =======================================================

The stream is float32, the rest activations. Norms of heads, RoPE and the append to the KV cache are one kernel with the
cache's layout in it, so they stay outside; so does the head, whose float32 logits TensorRT would round to the operands'
sixteen bits. Weights are inputs named as in `Names`, without their layer; `BETWEEN` takes ``input_norm`` and ``qkv`` of
the layer that follows.
"""

from __future__ import annotations

from pathlib import Path

from onnx import TensorProto

from builders.graph.standard import StandardLayers, matrix_shape
from builders.graph.writer import STANDARD_OPSET, GraphWriter
from builders.model_config import TextConfig
from builders.quantize import PrecisionName
from python_backends.runtime.gpu.plans import FIRST, LAST, PIECES
from python_backends.runtime.gpu.weights import Names


def write_pieces(
    text: TextConfig, precision: PrecisionName, folder: Path, *, activation: str | None = None
) -> dict[str, Path]:
    """Write every piece's ONNX file into ``folder``; they hold no weights. Returns the files by piece.

    ``activation`` replaces the precision's element type of activations.
    """
    written = {}
    for piece in PIECES:
        graph = GraphWriter(opset=STANDARD_OPSET)
        _Piece(graph, text, StandardLayers(graph, text, precision, activation)).write(piece)
        written[piece] = folder / f"{piece}.onnx"
        graph.save(written[piece])
    return written


class _Piece:
    def __init__(self, graph: GraphWriter, text: TextConfig, layers: StandardLayers) -> None:
        self._graph, self._text, self._layers = graph, text, layers

    def write(self, piece: str) -> None:
        graph = self._graph
        hidden, width = self._text.hidden_size, self._text.num_heads * self._text.head_dim
        attended = "" if piece == FIRST else self._layers.input("attended", self._layers.dtype, ["M", width])
        stream = self._layers.input("stream", TensorProto.FLOAT, ["M", hidden])
        if attended:
            stream = self._layers.behind_attention(attended, stream, str)
            stream = graph.rename(stream, "next_stream")
            graph.output(stream, TensorProto.FLOAT, ["M", hidden])
        if piece != LAST:
            packed = graph.rename(self._layers.projections(stream, str), "packed")
            graph.output(packed, self._layers.dtype, ["M", matrix_shape(self._text, Names.QKV)[0]])
