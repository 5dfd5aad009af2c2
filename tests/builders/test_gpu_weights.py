"""A GPU build's weight file holds the checkpoint's tensors where its index says, packed and rounded as documented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.build import Options, build
from builders.checkpoint import open_checkpoint
from builders.quantize import Precision
from python_backends import contract, manifest
from python_backends.errors import ArtifactError, BuildError
from python_backends.runtime.gpu.weights import (
    ALIGNMENT,
    INDEX_FILE,
    WEIGHT_FILE,
    Names,
    open_weights,
)
from tests.builders.checkpoint_files import complete
from tests.builders.graph.standard_dialect import dequantized, gpu_weights
from tests.checkpoints import DEMO, tiny

# The largest relative error (Frobenius) of a random matrix, and the element types of matrices in layers.
CASES: dict[Any, tuple[float, set[str]]] = {
    "fp32": (0, {"fp32"}),
    "bf16": (2e-3, {"bf16"}),
    "fp16": (3e-4, {"fp16"}),
    "fp8": (0.03, {"fp8e4nv"}),
    "int8": (0.011, {"i8"}),
    "int4": (0.115, {"i8", "u8"}),
}


def relative(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("family", ["1b", "27b"])
@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_the_checkpoints_within_the_precisions_error(tmp_path: Path, family: str, name: Any) -> None:
    opened = open_checkpoint(tiny(family))
    weights = gpu_weights(tiny(family), tmp_path, name)
    error, dtypes = CASES[name]
    assert {weights[Names.layer(0, kind)].dtype for kind in Names.MATRICES} == dtypes
    for layer in range(opened.config.text.num_layers):
        for kind, parts in (
            (Names.QKV, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (Names.O, ("self_attn.o_proj",)),
            (Names.GATE_UP, ("mlp.gate_proj", "mlp.up_proj")),
            (Names.DOWN, ("mlp.down_proj",)),
        ):
            wanted = np.concatenate([opened.tensor(f"layers.{layer}.{part}.weight").read() for part in parts])
            assert relative(dequantized(weights, Names.layer(layer, kind), wanted.shape[1]), wanted) <= error
        scale = np.float32(opened.config.text.query_pre_attn_scalar**-0.5)
        wanted = (1 + opened.tensor(f"layers.{layer}.self_attn.q_norm.weight").read()) * scale
        np.testing.assert_array_equal(weights.read(Names.layer(layer, Names.Q_NORM)), wanted)
        wanted = 1 + opened.tensor(f"layers.{layer}.post_feedforward_layernorm.weight").read()
        np.testing.assert_array_equal(weights.read(Names.layer(layer, Names.POST_FEEDFORWARD_NORM)), wanted)
    wanted = opened.tensor("embed_tokens.weight").read()
    assert relative(dequantized(weights, Names.EMBED, wanted.shape[1]), wanted) <= min(error, 0.011)
    assert Names.HEAD not in weights
    frequencies = weights.read(Names.inverse_frequency("global"))
    factor = 8 if family == "27b" else 1
    assert frequencies[0] == pytest.approx(1 / factor)
    assert frequencies[-1] == pytest.approx(1e6 ** -(1 - 2 / opened.config.text.head_dim) / factor, rel=1e-6)


def test_tensors_are_aligned_and_cover_the_file_in_order(tmp_path: Path) -> None:
    weights = gpu_weights(DEMO, tmp_path, "int4")
    assert weights.path.stat().st_size == weights.num_bytes
    assert weights.num_bytes % ALIGNMENT == 0
    end = 0
    for entry in weights.tensors.values():
        assert entry.offset == -(-end // ALIGNMENT) * ALIGNMENT
        end = entry.offset + entry.num_bytes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder, _: (folder / WEIGHT_FILE).unlink(), "cannot be read"),
        (lambda folder, _: (folder / INDEX_FILE).unlink(), "cannot be read"),
        (lambda folder, _: (folder / WEIGHT_FILE).write_bytes(b"short"), "has 5 bytes instead of"),
        (lambda _, index: index.update(format=99), "has format 99"),
        (lambda _, index: index.pop("activation"), "is corrupt"),
        (lambda _, index: index["tensors"]["norm"].update(dtype="fp7"), "is corrupt"),
        (lambda _, index: index["tensors"]["norm"].update(offset=1), "lies where it cannot"),
        (lambda _, index: index["tensors"]["norm"].update(offset=0), "lies where it cannot"),
    ],
)
def test_a_damaged_file_or_index_is_refused_with_how_to_rebuild(tmp_path: Path, damage: Any, message: str) -> None:
    gpu_weights(DEMO, tmp_path, "bf16")
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    damage(tmp_path, index)
    if (tmp_path / INDEX_FILE).exists():
        (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=f"{message}.*wicore build"):
        open_weights(tmp_path)


@pytest.mark.parametrize(("runtime", "precision"), [("tensorrt-rtx", "fp8"), ("tensorrt", "bf16")])
def test_a_gpu_build_without_plans_has_weights_and_all_stages(tmp_path: Path, runtime: str, precision: Any) -> None:
    target = tmp_path / "repository"
    found = build(complete(tmp_path / "checkpoint", "4b"), target, Options(Precision.of(precision), runtime)).manifest
    assert (found.runtime, found.precision) == (runtime, precision)
    assert set(found.stages) == set(contract.STAGES)
    weights = open_weights(manifest.load(target).folder(contract.DECODER))
    assert (weights.precision, weights.activation) == (precision, "bf16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "onnxruntime", "precision": Precision.of("fp8")}, "has no precision 'fp8'"),
        ({"runtime": "tensorrt-rtx", "precision": Precision.of("int8")}, "--block-size 0"),
        ({"runtime": "tensorrt", "precision": Precision.of("int4", 32)}, "--block-size 128"),
        ({"runtime": "onnxruntime", "precision": Precision.of("int8"), "plans": True}, "has no plans"),
        ({"runtime": "cuda", "precision": Precision.of("int8")}, "not offered"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: Any, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        Options(**options)
