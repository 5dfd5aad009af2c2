"""What quantizing costs the demo model: the commands that its README names, on the graphs that are served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WANTED = 0.97


def right(tmp_path: Path, precision: str, conversations: int) -> tuple[float, int]:
    command = [sys.executable, "-m", "client.cli", "demo", "eval", "--engine", "onnx", "--precision", precision]
    done = subprocess.run(
        [*command, "-n", str(conversations), "--json"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    (found,) = (json.loads(line) for line in done.stdout.splitlines())
    return found["accuracy"], found["questions"]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_builds_answer_held_out_questions(tmp_path: Path, precision: str) -> None:
    accuracy, asked = right(tmp_path, precision, 40)
    assert asked > 150
    assert accuracy >= WANTED


@pytest.mark.soak
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_quantized_builds_answer_a_thousand_held_out_questions(tmp_path: Path, precision: str) -> None:
    accuracy, asked = right(tmp_path, precision, 250)
    assert asked > 1000
    assert accuracy >= WANTED
