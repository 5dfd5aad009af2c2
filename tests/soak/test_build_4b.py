"""Checkpoints of the published shapes (4B: 8.6 GB in bfloat16) become int4 within the memory that is promised."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from builders.published_configs import PUBLISHED
from builders.random_checkpoint import write_random_checkpoint
from python_backends import contract, manifest
from tests.builders.checkpoint_files import add_tokenizer, write_json

CHILD = """
import sys
import typer
from builders.cli import build
app = typer.Typer()
app.command()(build)
app()
"""


def _cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    return {**config, "text_config": {**config["text_config"], "num_hidden_layers": layers}}


# All of 4B; of 27B what is largest: its embedding (5.6 GB in float32) and the widths of its layers, six of them.
CHECKPOINTS = {"4b": PUBLISHED["4b"], "27b-6-layers": _cut(PUBLISHED["27b"], 6)}


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_large_checkpoints_become_int4_far_below_six_gigabytes_of_memory(tmp_path: Path, name: str) -> None:
    checkpoint, repository = tmp_path / f"gemma-3-{name}", tmp_path / "repository"
    written = write_random_checkpoint(checkpoint, CHECKPOINTS[name])
    add_tokenizer(checkpoint)
    write_json(checkpoint / "preprocessor_config.json", {"size": {"height": 896, "width": 896}})
    arguments = [str(checkpoint), "--repository", str(repository), "--precision", "int4", "--json"]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True, capture_output=True, text=True)
    values = json.loads(done.stdout)
    sizes = {name: sum(file["size"] for file in stage["files"]) / 1e9 for name, stage in values.pop("stages").items()}
    print(json.dumps({**values, "stage_gigabytes": sizes}, indent=2))
    assert values["checkpoint_bytes"] == written > 8e9 * (name == "4b")
    assert values["peak_memory_bytes"] < 1e9
    # 4 bits and a 32-bit scale for 32 weights: 0.31 of bfloat16's 16 bits.
    assert sizes[contract.DECODER] < 0.33 * written / 1e9
    manifest.load(repository)
    again = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True, capture_output=True, text=True)
    assert json.loads(again.stdout)["status"] == "up-to-date"
    assert json.loads(again.stdout)["seconds"] < 1
    shutil.rmtree(tmp_path)  # gigabytes that pytest would keep
