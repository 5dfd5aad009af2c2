"""The vision encoder: uint8 pixels to image embeddings (SigLIP tower, average pooling, projector).

Input ``pixels`` [N, 3, H, W] uint8 RGB; output ``image_features`` [N, tokens_per_image, D] float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from onnx import TensorProto

from builders.checkpoint import Checkpoint, LazyTensor, VisionConfig, concat_rows, map_rows, transpose
from builders.graph.attention import encoder_attention
from builders.graph.decoder import DEFAULT_ACCURACY_LEVEL
from builders.graph.linear import Linears
from builders.graph.writer import GraphWriter, Value
from builders.quantize import Precision
from builders.weights import WeightFile
from python_backends.errors import BuildError

MODEL_FILE = "vision_encoder.onnx"
WEIGHT_FILE = "vision_encoder.weights"

# What the Gemma-3 image processor does to a channel value: times 1/255 in float64, then, in float32, less the mean and
# over the deviation.
RESCALE, _MEAN, _DEVIATION = 1 / 255, 0.5, 0.5


def write_vision_encoder(
    checkpoint: Checkpoint,
    precision: Precision,
    folder: Path,
    progress: Callable[[int], None] | None = None,
    *,
    accuracy_level: int = DEFAULT_ACCURACY_LEVEL,
) -> None:
    """Write ``vision_encoder.onnx`` and ``vision_encoder.weights`` into ``folder``; arguments as `write_decoder`.

    With int4 the tower's weights are int8: it is a tenth of the model at most, and four bits there turn the image
    embeddings by nine degrees (cosine 0.988 on random towers; 0.9999 with eight bits).

    Raises:
        BuildError: a text-only checkpoint, or one that cannot be read or converted.
        OSError: the disk is full.
    """
    config = vision_config(checkpoint)
    if precision.name == "int4":
        precision = dataclasses.replace(precision, name="int8")
    with WeightFile(folder / WEIGHT_FILE, progress) as weights:
        graph = GraphWriter(weights)
        VisionEncoder(graph, checkpoint, config, Linears(graph, precision, accuracy_level)).write()
        graph.save(folder / MODEL_FILE)


def vision_config(checkpoint: Checkpoint) -> VisionConfig:
    """The checkpoint's vision tower.

    Raises:
        BuildError: a text-only checkpoint.
    """
    config = checkpoint.config.vision
    if config is None:
        raise BuildError(f"{checkpoint.folder} is a text-only model: it has no vision encoder")
    return config


Stored = TypeVar("Stored")


class Products(Protocol[Stored]):
    """How a dialect stores matrices and multiplies with them."""

    def store(self, weight: LazyTensor, name: str) -> Stored:
        """Stream a weight [N, K] to the weight file."""
        ...

    def apply(self, x: Value, matrix: Stored, bias: Value = "") -> Value:
        """``x · Wᵀ + bias`` of x [T, K] float32 → [T, N] float32; the bias is float32 [N]."""
        ...


class VisionEncoder(Generic[Stored]):
    """Writes the tower and the projector; another dialect overrides `rescaled`, `patches` and `attention`."""

    def __init__(
        self, graph: GraphWriter, checkpoint: Checkpoint, config: VisionConfig, linears: Products[Stored]
    ) -> None:
        self._graph = graph
        self._checkpoint = checkpoint
        self._config = config
        self._linears = linears
        # [N, patches, -1], whatever N is.
        self._sequences = graph.ints(-1, config.patches_per_side**2, config.hidden_size)
        self._rows = graph.ints(-1, config.hidden_size)

    def write(self) -> None:
        """Write the network, from its input to its output."""
        graph, config = self._graph, self._config
        graph.input("pixels", TensorProto.UINT8, ["N", 3, config.image_size, config.image_size])
        stream = self._embed()
        for layer in range(config.num_layers):
            stream = self._layer(stream, f"vision.encoder.layers.{layer}.")
        self._project(self._norm(stream, "vision.post_layernorm"))
        hidden = self._checkpoint.config.text.hidden_size
        graph.output("image_features", TensorProto.FLOAT, ["N", config.tokens_per_image, hidden])

    def _embed(self) -> Value:
        """[N·patches, C]: pixels normalised as the processor does, cut into patches, with positions added."""
        graph, prefix = self._graph, "vision.embeddings."
        x = graph.op("Sub", self.rescaled("pixels"), graph.constant(_MEAN, np.float32))
        x = graph.op("Div", x, graph.constant(_DEVIATION, np.float32))
        x = self.patches(x, f"{prefix}patch_embedding")
        x = graph.reshape(x, graph.ints(0, 0, -1))
        x = graph.op("Transpose", x, perm=[0, 2, 1])
        x = graph.op("Add", x, self._plain(f"{prefix}position_embedding.weight"))
        return graph.reshape(x, self._rows)

    def rescaled(self, pixels: Value) -> Value:
        """uint8 0 … 255 → float32 0 … 1."""
        graph = self._graph
        x = graph.op("Mul", graph.cast(pixels, TensorProto.DOUBLE), graph.constant(RESCALE, np.float64))
        return graph.cast(x, TensorProto.FLOAT)

    def patches(self, x: Value, name: str) -> Value:
        """[N, 3, H, W] → [N, C, H / patch, W / patch] float32; ``name`` is that of kernel and bias."""
        kernel, bias = (self._plain(f"{name}.{part}") for part in ("weight", "bias"))
        return self._graph.op("Conv", x, kernel, bias, strides=[self._config.patch_size] * 2)

    def attention(self, packed: Value) -> Value:
        """Packed q, k, v [N·patches, 3·C] → [N·patches, C], all float32."""
        parts = self._graph.ops("Split", packed, outputs=3, axis=1, num_outputs=3)
        query, key, value = (self._graph.reshape(part, self._sequences) for part in parts)
        x = encoder_attention(self._graph, self._config.num_heads, query, key, value)
        return self._graph.reshape(x, self._rows)

    def _layer(self, stream: Value, prefix: str) -> Value:
        graph = self._graph
        x = self._norm(stream, prefix + "layer_norm1")
        packed = self._linear(x, prefix + "self_attn", "q_proj", "k_proj", "v_proj")
        stream = graph.op("Add", stream, self._linear(self.attention(packed), prefix + "self_attn", "out_proj"))

        x = self._linear(self._norm(stream, prefix + "layer_norm2"), prefix + "mlp", "fc1")
        x = self._linear(graph.op("Gelu", x, approximate="tanh"), prefix + "mlp", "fc2")
        return graph.op("Add", stream, x)

    def _project(self, x: Value) -> None:
        """Pool [N·patches, C] to one row per token, norm, and project to the decoder's width."""
        graph, config = self._graph, self._config
        side, pool = math.isqrt(config.tokens_per_image), config.pool_size
        x = graph.reshape(x, graph.ints(-1, side, pool, side, pool, config.hidden_size))
        x = graph.op("ReduceMean", x, graph.ints(2, 4), keepdims=0)
        gamma = map_rows(self._checkpoint.tensor("projector.mm_soft_emb_norm.weight"), lambda w: 1 + w)
        x = graph.op(
            "RMSNormalization",
            graph.reshape(x, self._rows),
            graph.weight("projector.mm_soft_emb_norm.weight", gamma),
            axis=-1,
            epsilon=config.layer_norm_eps,
        )
        name = "projector.mm_input_projection_weight"
        x = self._linears.apply(x, self._linears.store(transpose(self._checkpoint.tensor(name)), name))
        shape = graph.ints(-1, config.tokens_per_image, self._checkpoint.config.text.hidden_size)
        graph.op("Reshape", x, shape, outputs=["image_features"])

    def _linear(self, x: Value, prefix: str, *names: str) -> Value:
        weights, biases = (
            [self._checkpoint.tensor(f"{prefix}.{name}.{part}") for name in names] for part in ("weight", "bias")
        )
        name = f"{prefix}.{'_'.join(names)}"
        matrix = self._linears.store(concat_rows(weights), f"{name}.weight")
        return self._linears.apply(x, matrix, self._graph.weight(f"{name}.bias", concat_rows(biases)))

    def _norm(self, x: Value, name: str) -> Value:
        scale, bias = (self._plain(f"{name}.{part}") for part in ("weight", "bias"))
        return self._graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=self._config.layer_norm_eps)

    def _plain(self, name: str) -> Value:
        return self._graph.weight(name, self._checkpoint.tensor(name))
