"""Writes the weight file of a GPU build, a few rows at a time; `python_backends.runtime.gpu.weights` has the format."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from builders.checkpoint import Checkpoint, LazyTensor, TextConfig, concat_rows, map_rows
from builders.quantize import PER_CHANNEL, Precision, PrecisionName, map_chunks, quantize
from builders.tensors import Float32
from python_backends.errors import BuildError
from python_backends.runtime.gpu.launch import DTYPES
from python_backends.runtime.gpu.weights import ALIGNMENT, FORMAT, GROUP, INDEX_FILE, WEIGHT_FILE, Entry, Names

Storage = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]

ACTIVATIONS: dict[PrecisionName, str] = {
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
    "fp8": "bf16",
    "int8": "bf16",
    "int4": "bf16",
}
"""Element type of activations by precision."""

_FP8_MAX = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
_TINY = 1e-30


def storage(precision: PrecisionName, name: str) -> Storage:
    """How the matrix ``name`` of `Names` is stored.

    In four bits the attention projections have eight, as for ONNX Runtime (`builders.graph.decoder`). Embedding and
    head keep sixteen bits beside fp8, and eight beside int4: errors there reach the logits undamped.
    """
    if name in {Names.EMBED, Names.HEAD}:
        return "bf16" if precision == "fp8" else "int8" if precision == "int4" else precision
    return "int8" if precision == "int4" and name in {Names.QKV, Names.O} else precision


def write_gpu_weights(
    checkpoint: Checkpoint, precision: Precision, folder: Path, progress: Callable[[int], None] | None = None
) -> None:
    """Write ``decoder.weights`` and its index into ``folder``.

    ``progress`` is told the bytes of every piece written.

    Raises:
        BuildError: the checkpoint cannot be read, or holds a value beyond fp16's range in fp16.
        OSError: the disk is full.
    """
    text = checkpoint.config.text
    with contextlib.ExitStack() as stack:
        file = stack.enter_context((folder / WEIGHT_FILE).open("wb"))
        writer = _Writer(file, precision.name, progress or (lambda _: None))
        writer.decoder(checkpoint)
        writer.pad()
        file.flush()
        os.fsync(file.fileno())
        num_bytes = file.tell()
    tensors = {name: {"dtype": e.dtype, "shape": e.shape, "offset": e.offset} for name, e in writer.entries.items()}
    index = {
        "format": FORMAT,
        "num_bytes": num_bytes,
        "precision": precision.name,
        "activation": ACTIVATIONS[precision.name],
        "rms_norm_eps": text.rms_norm_eps,
        "embed_scale": math.sqrt(text.hidden_size),
        "tensors": tensors,
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


class _Writer:
    """Appends tensors in the order of computation."""

    def __init__(self, file: BinaryIO, precision: PrecisionName, progress: Callable[[int], None]) -> None:
        self._file = file
        self._precision = precision
        self._progress = progress
        self.entries: dict[str, Entry] = {}

    def decoder(self, checkpoint: Checkpoint) -> None:
        text = checkpoint.config.text
        self._matrix(Names.EMBED, Names.EMBED, checkpoint.tensor("embed_tokens.weight"))
        for kind in sorted(set(text.layer_types)):
            self._array(Names.inverse_frequency(kind), "fp32", inverse_frequency(text, kind))
        for layer in range(text.num_layers):
            self._layer(checkpoint, layer)
        self._norm(Names.NORM, checkpoint.tensor("norm.weight"))
        if not text.tie_embeddings:
            self._matrix(Names.HEAD, Names.HEAD, checkpoint.tensor("lm_head.weight"))

    def _layer(self, checkpoint: Checkpoint, layer: int) -> None:
        for name, tensor, scale in layer_norms(checkpoint, layer):
            self._norm(Names.layer(layer, name), tensor, scale)
        for name, tensor in layer_matrices(checkpoint, layer):
            self._matrix(Names.layer(layer, name), name, tensor)

    def _norm(self, name: str, tensor: LazyTensor, scale: float = 1.0) -> None:
        self._array(name, "fp32", gemma_gamma(tensor, scale).read())

    def _matrix(self, name: str, kind: str, weight: LazyTensor) -> None:
        """A weight [N, K], quantized on every core with a bounded number of pieces in flight."""
        stored = storage(self._precision, kind)
        rows, columns = weight.shape
        if stored in {"fp32", "bf16", "fp16"}:
            pieces = map_chunks(weight, lambda values: narrow(name, values, stored))
            self._stream(name, stored, (rows, columns), pieces)
            return
        scales: list[NDArray[Any]] = []
        work, dtype, width = {
            "fp8": (quantize_fp8, "fp8e4nv", columns),
            "int8": (quantize_int8, "i8", columns),
            "int4": (quantize_int4, "u8", -(-columns // 2)),
        }[stored]

        def data() -> Iterator[NDArray[Any]]:
            for values, scale in map_chunks(weight, work):
                scales.append(scale)
                yield values

        self._stream(name, dtype, (rows, width), data())
        self._array(Names.scale(name), "bf16" if stored == "int4" else "fp32", np.concatenate(scales))

    def _array(self, name: str, dtype: str, values: NDArray[Any]) -> None:
        self._stream(name, dtype, values.shape, [values.astype(DTYPES[dtype])])

    def _stream(self, name: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[NDArray[Any]]) -> None:
        self.pad()
        entry = self.entries[name] = Entry(dtype, shape, self._file.tell())
        for piece in pieces:
            if piece.dtype != DTYPES[dtype]:
                raise BuildError(f"{name}: got {piece.dtype} for a tensor of {dtype}")
            self._file.write(np.ascontiguousarray(piece).view(np.uint8).data)
            self._progress(piece.nbytes)
        if self._file.tell() != entry.offset + entry.num_bytes:
            raise BuildError(f"{name}: what was written does not fill the shape {list(shape)}")

    def pad(self) -> None:
        """Go on at the next aligned byte."""
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))


# --- tensors of a layer -------------------------------------------------------------------------------------------


def layer_matrices(checkpoint: Checkpoint, layer: int) -> Iterator[tuple[str, LazyTensor]]:
    """A layer's matrices [N, K] by their name in `Names`, packed as the GPU reads them."""
    for name, parts in (
        (Names.QKV, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        (Names.O, ("self_attn.o_proj",)),
        (Names.GATE_UP, ("mlp.gate_proj", "mlp.up_proj")),
        (Names.DOWN, ("mlp.down_proj",)),
    ):
        tensors = [checkpoint.tensor(f"layers.{layer}.{part}.weight") for part in parts]
        yield name, concat_rows(tensors) if len(tensors) > 1 else tensors[0]


def layer_norms(checkpoint: Checkpoint, layer: int) -> Iterator[tuple[str, LazyTensor, float]]:
    """A layer's norms as the checkpoint has them, by their name in `Names`, and what 1 + w is multiplied by."""
    scale = checkpoint.config.text.query_pre_attn_scalar**-0.5
    for name, source, factor in (
        (Names.INPUT_NORM, "input_layernorm", 1.0),
        (Names.Q_NORM, "self_attn.q_norm", scale),
        (Names.K_NORM, "self_attn.k_norm", 1.0),
        (Names.POST_ATTENTION_NORM, "post_attention_layernorm", 1.0),
        (Names.PRE_FEEDFORWARD_NORM, "pre_feedforward_layernorm", 1.0),
        (Names.POST_FEEDFORWARD_NORM, "post_feedforward_layernorm", 1.0),
    ):
        yield name, checkpoint.tensor(f"layers.{layer}.{source}.weight"), factor


def gemma_gamma(tensor: LazyTensor, scale: float = 1.0) -> LazyTensor:
    """(1 + w) · scale of a norm's weight."""
    return map_rows(tensor, lambda w: (1 + w) * np.float32(scale))


def inverse_frequency(text: TextConfig, kind: str) -> Float32:
    """RoPE's [head_dim / 2] of "local" or "global" layers; global positions are divided by the scaling factor."""
    theta = text.rope_theta_local if kind == "local" else text.rope_theta_global
    factor = 1.0 if kind == "local" else text.rope_scaling_factor
    return (theta ** -(np.arange(0, text.head_dim, 2) / text.head_dim) / factor).astype(np.float32)


# --- rows in other element types ----------------------------------------------------------------------------------


def narrow(name: str, values: Float32, dtype: str) -> NDArray[Any]:
    """Values as fp32, bf16 or fp16.

    Raises:
        BuildError: one is beyond fp16's range.
    """
    if dtype == "fp16" and np.abs(values).max(initial=0) > float(np.finfo(np.float16).max):
        raise BuildError(f"{name} holds values beyond float16's range; build with --precision bf16, fp8, int8 or int4")
    return values.astype(DTYPES[dtype])


def quantize_fp8(rows: Float32) -> tuple[NDArray[Any], Float32]:
    """[N, K] as float8_e4m3fn and a scale [N]: the largest weight of a row becomes 448."""
    scale = np.maximum(np.abs(rows).max(1), _TINY) / _FP8_MAX
    values = np.clip(rows / scale[:, None], -_FP8_MAX, _FP8_MAX)  # rounding must not pass the end: there is NaN
    return values.astype(ml_dtypes.float8_e4m3fn), scale.astype(np.float32)


def quantize_int8(rows: Float32) -> tuple[NDArray[np.int8], Float32]:
    """[N, K] as int8 and a scale [N] that fits with the least squared error; it may be negative."""
    found = quantize(rows, Precision("int8", PER_CHANNEL))
    values = found.data.reshape(len(rows), -1)[:, : rows.shape[1]]
    return (values ^ 0x80).view(np.int8), found.scales[:, 0]


def quantize_int4(rows: Float32) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """[N, K] as packed bytes [N, ceil(K / 2)] and bfloat16 scales [N, ceil(K / GROUP)]."""
    found = quantize(rows, Precision("int4", GROUP))
    packed = found.data.reshape(len(rows), -1)[:, : -(-rows.shape[1] // 2)]
    return packed, found.scales.astype(ml_dtypes.bfloat16)
