"""`wicore bench precision` on the demo model: its held-out questions on KV that was rounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.bench.precision import precision_text
from client.commands.app import app
from python_backends.config import KV_PRECISIONS


def test_questions_are_answered_from_kv_in_every_precision(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WICORE_CPU_KERNELS", "onnxruntime")  # ours are compiled first
    run = CliRunner().invoke(
        app, ["bench", "precision", "--repository", str(repository), "--conversations", "1", "--json"]
    )
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)["precisions"]
    assert tuple(found) == KV_PRECISIONS
    exact, *rounded = found.values()
    assert (exact["stored_share"], exact["same_answers"], exact["coding_bytes_per_s"]) == (1.0, 1.0, None)
    assert [each["stored_share"] for each in rounded] == [(1 + 4 / 32) / 4, (0.5 + 4 / 32) / 4]
    for each in found.values():
        assert each["questions"] == exact["questions"] > 1
        assert each["accuracy"] >= 0.5, "rounding does not make the demo model useless"
        assert each["reused_share"] > 0.8
    assert all(each["coding_bytes_per_s"] > 0 for each in rounded)
    assert f"{exact['questions']} held-out questions" in precision_text({"precisions": found})
