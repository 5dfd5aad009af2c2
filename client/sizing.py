"""What of a model fits this machine: runtime, precision, and how many sequences of what length."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from builders.checkpoint import Checkpoint, open_checkpoint
from builders.quantize import PER_CHANNEL
from client.gateway.gpu import GpuMeter
from python_backends.config import Config
from python_backends.errors import ConfigError
from python_backends.manifest import ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from python_backends.runtime.memory import window_rows
from python_backends.runtime.providers import CPU, missing_for_cuda

Precision = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]
BYTES_PER_WEIGHT: dict[Precision, float] = {"bf16": 2.0, "int8": 1.13, "int4": 0.63}
"""With their scales; int4 keeps embeddings and attention in eight bits."""
LADDER: dict[str, tuple[Precision, ...]] = {"gpu": ("bf16", "int8", "int4"), "cpu": ("int8", "int4")}
"""From the finest on."""
WEIGHTS_SHARE = 0.6
"""Of the memory that is free, what weights may take; the rest is for KV, steps and the other processes."""
KV_SHARE = 0.7
"""Of what weights leave, what KV may take."""
KV_ROUNDING = 1.02
"""The configuration's number is rounded, and must not be too small for one slot."""
SHORTEST_CONTEXT = 8192
"""Rather fewer sequences than shorter ones than this."""


@dataclass(frozen=True)
class Plan:
    """What to build and how large to serve it. Sizes are GB, lengths tokens."""

    runtime: str
    precision: Precision
    block_size: int | None
    weights_gb: float
    free_gb: float
    max_batch_size: int
    max_context_length: int
    kv_gb: float
    """Of slots, and on the CPU of kept KV beside them."""
    on_gpu: bool

    def __str__(self) -> str:
        place = "GPU" if self.on_gpu else "CPU"
        return (
            f"{self.precision} for {self.runtime} on the {place}, {self.weights_gb:.2g} of {self.free_gb:.3g} GB for "
            f"weights; {self.max_batch_size} sequences of {self.max_context_length:,} tokens in {self.kv_gb:.2g} GB"
        )

    def configuration(self) -> dict[str, Any]:
        """The keys of wicore.json that the plan decides."""
        memory = "gpu_memory_gb" if self.on_gpu else "cpu_memory_gb"
        size = self.free_gb if self.on_gpu else self.kv_gb
        return {
            "max_batch_size": self.max_batch_size,
            "max_context_length": self.max_context_length,
            memory: round(size, 3),
        }


def choose(folder: Path, settings: Config) -> Plan:
    """The finest precision that fits, and as many sequences as its rest of memory holds.

    Raises:
        BuildError: no checkpoint that can be built.
        ConfigError: it does not fit in any precision.
    """
    checkpoint = open_checkpoint(folder)
    runtime, free, on_gpu = _runtime(settings)
    ladder = LADDER["gpu" if on_gpu else "cpu"]
    if runtime != ONNXRUNTIME and settings.trt_precision != "auto":
        ladder = (settings.trt_precision,)  # type: ignore[assignment]  # Config.__post_init__ has checked it
    weights = _num_weights(checkpoint)
    for precision in ladder:
        needed = weights * BYTES_PER_WEIGHT.get(precision, 4.0 if precision == "fp32" else 2.0)
        if needed <= free * WEIGHTS_SHARE:
            break
    else:
        raise ConfigError(
            f"{folder.name} has {weights / 1e9:.2g} billion weights; in {ladder[-1]} they take "
            f"{needed / 1e9:.2g} GB, more than {WEIGHTS_SHARE:.0%} of the {free / 1e9:.2g} GB that are "
            "free; take a smaller model or a larger machine"
        )
    # What kept KV takes of the host's memory is not the slots'.
    kept = settings.kv_cache_share if settings.enable_hmt and not on_gpu else 0.0
    room = (free - needed) * KV_SHARE
    if not on_gpu:
        room = min(room, settings.cpu_memory_gb * 1e9)  # which is of KV alone
    slots, context, kv = _slots(checkpoint, settings, room * (1 - kept))
    kv /= 1 - kept
    block = PER_CHANNEL if runtime != ONNXRUNTIME and precision == "int8" else None
    return Plan(runtime, precision, block, needed / 1e9, free / 1e9, slots, context, kv / 1e9, on_gpu)


def _runtime(settings: Config) -> tuple[str, float, bool]:
    """What executes the model here, the bytes it may take, and whether they are a GPU's."""
    gpu = GpuMeter().read()
    if gpu is not None:
        free = min(float(gpu.memory_total_bytes - gpu.memory_used_bytes), settings.gpu_memory_gb * 1e9)
        for module, name in (("tensorrt", TENSORRT), ("tensorrt_rtx", TENSORRT_RTX)):
            if importlib.util.find_spec(module):
                return name, free, True
        if settings.execution_provider != CPU and not missing_for_cuda():
            return ONNXRUNTIME, free, True
    return ONNXRUNTIME, float(psutil.virtual_memory().available), False


def _num_weights(checkpoint: Checkpoint) -> int:
    total = 0
    for tensor in checkpoint.tensors.values():
        count = 1
        for size in tensor.shape:
            count *= size
        total += count
    return total


def _slots(checkpoint: Checkpoint, settings: Config, room: float) -> tuple[int, int, float]:
    """(sequences, tokens of each, bytes): the context shrinks first, then the number of sequences."""
    text = checkpoint.config.text
    context = min(settings.max_context_length, text.max_context_length)
    slots = settings.max_batch_size
    layers = [kind == "global" for kind in text.layer_types]

    def kv_bytes(tokens: int) -> int:
        """Of one sequence in the slots' 2 bytes a number; local layers hold their window and some slack."""
        a_token = 2 * text.num_kv_heads * text.head_dim * 2
        window = window_rows(text.sliding_window)
        return a_token * sum(tokens if is_global else window for is_global in layers)

    while slots * kv_bytes(context) > room and context > SHORTEST_CONTEXT:
        context //= 2
    while slots * kv_bytes(context) > room and slots > 1:
        slots -= 1
    return slots, context, min(room, slots * kv_bytes(context) * KV_ROUNDING)
