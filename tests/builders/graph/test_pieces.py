"""The decoder cut at attention, with attention written out in NumPy between the pieces, is transformers' decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.checkpoint import open_checkpoint
from builders.graph.pieces import write_pieces
from python_backends.runtime.gpu.plans import BETWEEN
from python_backends.runtime.gpu.weights import Names
from tests.builders.graph.cut_decoder import following, logits
from tests.builders.graph.standard_dialect import (
    element_type,
    gpu_weights,
    relative_error,
    run,
    session,
)
from tests.checkpoints import FIRST_TEXT, IMAGE, tiny
from tests.reference import reference


@pytest.mark.parametrize("family", ["1b", "27b"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 6e-3)])
def test_pieces_and_attention_give_transformers_logits(
    tmp_path: Path, family: str, precision: Any, tolerance: float
) -> None:
    text = open_checkpoint(tiny(family)).config.text
    weights = gpu_weights(tiny(family), tmp_path, precision)
    ids = np.random.default_rng(0).integers(FIRST_TEXT, IMAGE, 40)
    found = logits(text, weights, write_pieces(text, precision, tmp_path), ids)
    assert relative_error(found, reference(tiny(family)).logits(ids)) < tolerance


@pytest.mark.parametrize("family", ["1b", "27b"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp8", 0.06), ("int8", 0.02), ("int4", 0.02)])
def test_fewer_bits_cost_no_more_than_rounding_activations(
    tmp_path: Path, family: str, precision: Any, tolerance: float
) -> None:
    text = open_checkpoint(tiny(family)).config.text
    weights = gpu_weights(tiny(family), tmp_path, precision)
    (tmp_path / "wide").mkdir()
    narrow = write_pieces(text, precision, tmp_path, activation="fp32")[BETWEEN]
    wide = write_pieces(text, "fp32", tmp_path / "wide")[BETWEEN]
    rng = np.random.default_rng(0)
    stream = rng.standard_normal((9, text.hidden_size))
    attended = rng.standard_normal((9, text.num_heads * text.head_dim)) * 10 ** rng.uniform(-3, 3, (9, 1))
    found = run(session(narrow, weights, following(2)), stream=stream, attended=attended)
    wanted = run(session(wide, weights, following(2), wide=True), stream=stream, attended=attended)
    for name, values in wanted.items():
        assert 0 < relative_error(found[name], values) < tolerance, (name, relative_error(found[name], values))


@pytest.mark.parametrize(
    ("precision", "activation", "matrices"),
    [
        ("bf16", "BFLOAT16", ["BFLOAT16"] * 4),
        ("fp16", "FLOAT16", ["FLOAT16"] * 4),
        ("fp8", "BFLOAT16", ["FLOAT8E4M3FN"] * 4),
        ("int8", "BFLOAT16", ["INT8"] * 4),
        ("int4", "BFLOAT16", ["INT8", "INT8", "INT4", "INT4"]),
    ],
)
def test_a_piece_takes_weights_as_the_weight_file_stores_them(
    tmp_path: Path, precision: Any, activation: str, matrices: list[str]
) -> None:
    piece = write_pieces(open_checkpoint(tiny("1b")).config.text, precision, tmp_path)[BETWEEN]
    assert [element_type(piece, name) for name in Names.MATRICES] == matrices
    assert {element_type(piece, name) for name in ("attended", "packed")} == {activation}
    assert {element_type(piece, name) for name in ("stream", "next_stream", Names.INPUT_NORM)} == {"FLOAT"}
