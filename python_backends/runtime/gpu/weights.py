"""The weight file of a GPU build: one file that goes into device memory as it lies, and an index beside it.

``decoder.weights`` holds every tensor of the decoder at an offset that is a multiple of `ALIGNMENT`, so that one
allocation of the file's size, filled by large sequential copies, is all the loading there is; ``decoder.weights.json``
says where each tensor lies. Names are those of `Names` below; shapes and element types:

=====================  ======================================  ==============================================
tensor                 shape                                   element type
=====================  ======================================  ==============================================
``embed_tokens``       [V, D]; rows are not yet scaled         matrix: bf16, fp16, fp32 or i8
``lm_head``            [V, D]; only where it is not tied       matrix, as ``embed_tokens``
``layers.L.qkv``       [(H + 2·KV)·hd, D]: rows of q, k, v     matrix
``layers.L.o``         [D, H·hd]                               matrix
``layers.L.gate_up``   [2·I, D]: rows of gate, then of up      matrix
``layers.L.down``      [D, I]                                  matrix
``layers.L.*_norm``    [D]; ``q_norm``, ``k_norm`` [hd]        fp32, stored 1 + w (``q_norm`` also with the
                                                               score's scale query_pre_attn_scalar^−0.5)
``norm``               [D]                                     fp32, stored 1 + w
``inverse_frequency``  [hd/2]; ``.local`` and ``.global``      fp32, with the scaling of positions in it
=====================  ======================================  ==============================================

A matrix [N, K] is stored in a floating type as it is; as fp8e4nv or i8 with ``NAME.scale`` fp32 [N], ``w ≈ q · scale``;
in four bits as u8 [N, ceil(K / 2)] with ``NAME.scale`` bf16 [N, ceil(K / 128)], two values a byte along K, the first in
the lower half, ``w ≈ (q − 8) · scale`` (scales may be negative: the longer side of the range lies where it is needed).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from python_backends.errors import ArtifactError
from python_backends.runtime.gpu.launch import DTYPES

WEIGHT_FILE = "decoder.weights"
INDEX_FILE = "decoder.weights.json"
FORMAT = 1
ALIGNMENT = 4096
"""Bytes: a page, and what O_DIRECT and device memory ask for."""
GROUP = 128
"""Four-bit weights along K that share a scale."""


class Names:
    """Names of the tensors; a layer's are made by `Names.layer`."""

    EMBED: Final = "embed_tokens"
    HEAD: Final = "lm_head"
    NORM: Final = "norm"
    QKV: Final = "qkv"
    O: Final = "o"  # noqa: E741
    GATE_UP: Final = "gate_up"
    DOWN: Final = "down"
    MATRICES: Final = (QKV, O, GATE_UP, DOWN)
    INPUT_NORM: Final = "input_norm"
    POST_ATTENTION_NORM: Final = "post_attention_norm"
    PRE_FEEDFORWARD_NORM: Final = "pre_feedforward_norm"
    POST_FEEDFORWARD_NORM: Final = "post_feedforward_norm"
    Q_NORM: Final = "q_norm"
    K_NORM: Final = "k_norm"
    NORMS: Final = (INPUT_NORM, Q_NORM, K_NORM, POST_ATTENTION_NORM, PRE_FEEDFORWARD_NORM, POST_FEEDFORWARD_NORM)

    @staticmethod
    def layer(layer: int, name: str) -> str:
        """The tensor ``name`` of a layer."""
        return f"layers.{layer}.{name}"

    @staticmethod
    def scale(name: str) -> str:
        """The scales of a quantized matrix."""
        return f"{name}.scale"

    @staticmethod
    def inverse_frequency(kind: str) -> str:
        """RoPE's inverse frequencies of "local" or "global" layers."""
        return f"inverse_frequency.{kind}"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the file."""

    dtype: str
    """Triton-lang's name, a key of `DTYPES`."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class GpuWeights:
    """The index of a weight file. It holds no weight; `read` gives one for tests and for small tensors."""

    path: Path
    num_bytes: int
    """Size of the file, a multiple of `ALIGNMENT`."""
    precision: str
    """What was asked for: bf16, fp16, fp32, fp8, int8 or int4."""
    activation: str
    """Element type of activations, keys and values: bf16, fp16 or fp32."""
    rms_norm_eps: float
    embed_scale: float
    """What rows of ``embed_tokens`` are multiplied by: the square root of D."""
    tensors: Mapping[str, Entry]

    def __getitem__(self, name: str) -> Entry:
        try:
            return self.tensors[name]
        except KeyError:
            raise ArtifactError(f"{self.path} holds no tensor {name!r}; {_REBUILD}") from None

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor as an array that the caller owns.

        Raises:
            ArtifactError: there is none of that name, or the file cannot be read.
        """
        entry = self[name]
        try:
            raw = np.fromfile(self.path, np.uint8, entry.num_bytes, offset=entry.offset)
        except OSError as error:
            raise ArtifactError(f"{self.path} cannot be read: {error.strerror}; {_REBUILD}") from error
        if raw.size != entry.num_bytes:
            raise ArtifactError(f"{self.path} ends inside {name!r}; {_REBUILD}")
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def check_integrity(self) -> None:
        """Check that every tensor lies inside the file, aligned, and over no other.

        Raises:
            ArtifactError: one does not, or the file has another size.
        """
        end = 0
        for name, entry in sorted(self.tensors.items(), key=lambda item: item[1].offset):
            if entry.offset % ALIGNMENT or entry.offset < end or entry.offset + entry.num_bytes > self.num_bytes:
                raise ArtifactError(f"{self.path}: tensor {name!r} lies where it cannot; {_REBUILD}")
            end = entry.offset + entry.num_bytes
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise ArtifactError(f"{self.path} cannot be read: {error.strerror}; {_REBUILD}") from error
        if size != self.num_bytes:
            raise ArtifactError(f"{self.path} has {size} bytes instead of {self.num_bytes}; {_REBUILD}")


_REBUILD = "run `wicore build` with --runtime tensorrt-rtx or tensorrt again"


def open_weights(folder: Path) -> GpuWeights:
    """The index in a decoder's folder, checked against the file beside it; no weight is read.

    Raises:
        ArtifactError: index or file is missing, corrupt, or of another version.
    """
    path = folder / INDEX_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; {_REBUILD}") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise ArtifactError(f"{path} has format {found!r}, this WiCore reads {FORMAT}; {_REBUILD}")
    try:
        weights = GpuWeights(
            path=folder / WEIGHT_FILE,
            num_bytes=int(values["num_bytes"]),
            precision=str(values["precision"]),
            activation=str(values["activation"]),
            rms_norm_eps=float(values["rms_norm_eps"]),
            embed_scale=float(values["embed_scale"]),
            tensors={name: _entry(entry) for name, entry in values["tensors"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} is corrupt ({error!r}); {_REBUILD}") from error
    weights.check_integrity()
    return weights


def _entry(values: Mapping[str, Any]) -> Entry:
    entry = Entry(str(values["dtype"]), tuple(int(extent) for extent in values["shape"]), int(values["offset"]))
    if entry.dtype not in DTYPES or min(entry.shape, default=1) < 1 or entry.offset < 0:
        raise ValueError(f"no such tensor can be: {entry}")
    return entry
