"""Random weights of a published shape, made on the device: what a step costs does not depend on what they are.

Every matrix has values of its own (equal ones could be merged or cached), drawn from one block of random numbers at
different places.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from builders.gpu_weights import ACTIVATIONS, storage
from builders.model_config import TextConfig
from builders.quantize import PrecisionName
from python_backends.runtime.gpu.device_weights import DeviceWeights
from python_backends.runtime.gpu.launch import DTYPES, Device
from python_backends.runtime.gpu.weights import ALIGNMENT, GROUP, Entry, GpuWeights, Names

_BLOCK = 48 << 20
_DTYPES = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8e4nv", "int8": "i8", "int4": "u8"}


def random_weights(device: Device, text: TextConfig, precision: PrecisionName) -> DeviceWeights:
    """The weights of a decoder in the layout of `builders.gpu_weights`."""
    entries: dict[str, Entry] = {}
    end = 0

    def add(name: str, dtype: str, *shape: int) -> None:
        nonlocal end
        entries[name] = Entry(dtype, shape, end)
        end += -(-entries[name].num_bytes // ALIGNMENT) * ALIGNMENT

    def matrix(name: str, kind: str, rows: int, columns: int) -> None:
        stored = storage(precision, kind)
        add(name, _DTYPES[stored], rows, columns // 2 if stored == "int4" else columns)
        if stored in {"fp8", "int8"}:
            add(Names.scale(name), "fp32", rows)
        elif stored == "int4":
            add(Names.scale(name), "bf16", rows, -(-columns // GROUP))

    width, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    matrix(Names.EMBED, Names.EMBED, text.vocab_size, text.hidden_size)
    for kind in ("local", "global"):
        add(Names.inverse_frequency(kind), "fp32", text.head_dim // 2)
    for layer in range(text.num_layers):
        for name in Names.NORMS:
            size = text.head_dim if name in {Names.Q_NORM, Names.K_NORM} else text.hidden_size
            add(Names.layer(layer, name), "fp32", size)
        for name, rows, columns in (
            (Names.QKV, width + 2 * kv, text.hidden_size),
            (Names.O, text.hidden_size, width),
            (Names.GATE_UP, 2 * text.intermediate_size, text.hidden_size),
            (Names.DOWN, text.hidden_size, text.intermediate_size),
        ):
            matrix(Names.layer(layer, name), name, rows, columns)
    add(Names.NORM, "fp32", text.hidden_size)
    index = GpuWeights(
        Path(), end, precision, ACTIVATIONS[precision], text.rms_norm_eps, math.sqrt(text.hidden_size), entries
    )
    weights = DeviceWeights(index, device.allocate("u8", end))
    _fill(device, weights, entries)
    return weights


def _fill(device: Device, weights: DeviceWeights, entries: dict[str, Entry]) -> None:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(_BLOCK // 2, np.float32) * np.float32(0.02)
    blocks = {
        "bf16": normal.astype(DTYPES["bf16"]).view(np.uint8),
        "fp16": normal.astype(np.float16).view(np.uint8),
        "fp32": normal.view(np.uint8),
        "fp8e4nv": (normal * 5000).astype(DTYPES["fp8e4nv"]).view(np.uint8),
        "i8": (normal * 1600).clip(-127, 127).astype(np.int8).view(np.uint8),
        "u8": rng.integers(0, 256, _BLOCK // 2, np.uint8),
    }
    for name, entry in entries.items():
        target = weights.vector(name)
        if name.endswith(".scale"):
            scale = 0.02 / (100 if entry.dtype == "fp32" else 4)
            device.write(target, np.full(entry.shape, scale, DTYPES[entry.dtype]))
        elif "norm" in name:
            device.write(target, np.ones(entry.shape, np.float32))
        elif "inverse_frequency" in name:
            device.write(target, (1e4 ** -np.linspace(0, 1, entry.shape[0])).astype(np.float32))
        else:
            fill_bytes(device, target.address, entry.num_bytes, blocks[entry.dtype], int(rng.integers(0, 1 << 20)) * 16)


def fill_bytes(device: Device, address: int, count: int, block: np.ndarray, offset: int) -> None:
    """Write ``count`` bytes of a repeated block, starting somewhere inside it."""
    from python_backends.runtime.gpu.launch import Tensor

    done = 0
    offset %= len(block)
    while done < count:
        part = block[offset : offset + count - done]
        device.write(Tensor(address + done, "u8", (len(part),)), part)
        done += len(part)
        offset = 0
