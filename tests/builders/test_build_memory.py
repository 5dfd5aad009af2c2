"""Memory of a build, measured in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from builders.published_configs import PUBLISHED
from builders.random_checkpoint import write_random_checkpoint
from tests.builders.checkpoint_files import add_tokenizer

MEASURE = """
import json, sys
from pathlib import Path
from builders.build import Options, build, peak_memory
from builders.quantize import Precision
import builders.graph.decoder, builders.model_config, transformers.models.gemma3.configuration_gemma3, tokenizers

before = peak_memory()
result = build(Path(sys.argv[1]), Path(sys.argv[2]), Options(Precision(sys.argv[3])))
print(json.dumps({"source": result.source_bytes, "growth": result.peak_memory_bytes - before}))
"""


@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_memory_stays_far_below_the_checkpoints_size(tmp_path: Path, precision: str) -> None:
    folder = tmp_path / "checkpoint"
    text = {**PUBLISHED["270m"], "vocab_size": 131072, "hidden_size": 1024, "num_hidden_layers": 12}
    text["layer_types"] = text["layer_types"][:12]
    write_random_checkpoint(folder, text, shard_bytes=10**8)
    add_tokenizer(folder)
    try:
        measured = subprocess.run(
            [sys.executable, "-c", MEASURE, folder, tmp_path / "repository", precision],
            check=True,
            capture_output=True,
            text=True,
        )
    finally:
        shutil.rmtree(folder)  # half a gigabyte that pytest would keep
        shutil.rmtree(tmp_path / "repository", ignore_errors=True)
    figures = json.loads(measured.stdout)
    assert figures["source"] > 450 * 10**6
    assert figures["growth"] < 200 * 10**6
