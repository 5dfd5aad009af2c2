"""`wicore bench peers` compares like with like: engines that compute in float32 agree, whatever the checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from builders.quantize import Precision
from builders.random_checkpoint import make_checkpoint, write_random_checkpoint, write_random_tokenizer
from client.bench.peers.compare import cosine, ratios, relative_error
from client.bench.peers.engines import label, read_label
from client.bench.peers.worker import Worker
from client.commands.app import app
from python_backends.errors import BuildError, ServerUnavailableError
from tests.checkpoints import small_multimodal

SIZES = ["--batch", "1", "--batch", "2", "--prompt-tokens", "24", "--output-tokens", "6", "--prefill-tokens", "40"]
TOOLS = os.environ.get("WICORE_BENCH_TOOLS")
"""A folder that `wicore bench peers --tools` has put llama.cpp into."""
SHAPES = ["text", "multimodal"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("peers")
    make_checkpoint(folder / "text", "tiny")
    write_random_checkpoint(folder / "multimodal", small_multimodal())
    write_random_tokenizer(folder / "multimodal")
    return {name: folder / name for name in SHAPES}


def compared(checkpoint: Path, tools: Path, *options: str) -> dict[str, Any]:
    """Engines by name. The probe is longer than the window, so that masks and both RoPE bases count."""
    arguments = [str(checkpoint), "--tools", str(tools), *SIZES, "--repeats", "1", "--probe-tokens", "150", "--json"]
    done = CliRunner().invoke(app, ["bench", "peers", *arguments, *options])
    assert done.exit_code == 0, done.output
    return {one["engine"]: one for one in json.loads(done.stdout)["engines"]}


@pytest.mark.parametrize("shape", SHAPES)
def test_our_logits_are_those_of_transformers(shape: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    options = ["--ours", "fp32", "--ours", "int8:32", "--without", "llama.cpp"]
    found = compared(checkpoints[shape], tmp_path, *options)
    assert found["wicore fp32"]["cosine"] > 0.9999
    assert found["wicore fp32"]["relative_error"] < 0.001
    assert found["wicore int8:32"]["cosine"] > 0.99
    assert found["transformers bf16"]["cosine"] > 0.99
    assert set(found["transformers bf16"]["variants_tokens_per_s"]) == {"sdpa", "eager"}
    for one in found.values():
        assert one["peak_memory_bytes"] > 10**7
        assert all(speed > 0 for speed in (*one["decode_tokens_per_s"].values(), one["prefill_tokens_per_s"]))


@pytest.mark.skipif(
    TOOLS is None, reason="llama.cpp takes minutes to compile; WICORE_BENCH_TOOLS names a folder with it"
)
@pytest.mark.parametrize("shape", SHAPES)
def test_gguf_files_hold_the_same_model(shape: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "peers").symlink_to(Path(str(TOOLS)).resolve() / "peers")
    options = [option for kind in ("f32", "bf16", "q8_0", "q4_0") for option in ("--gguf", kind)]
    found = compared(checkpoints[shape], tmp_path, "--ours", "fp32", *options)
    assert found["llama.cpp f32"]["cosine"] > 0.9999
    assert found["llama.cpp bf16"]["cosine"] > 0.9999
    assert found["llama.cpp q8_0"]["cosine"] > 0.99
    assert 0.8 < found["llama.cpp q4_0"]["cosine"] < 0.99


def test_a_checkpoint_whose_weights_transformers_would_make_up_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "renamed").mkdir()
    for path in checkpoints["text"].iterdir():
        if path.suffix == ".safetensors":
            tensors = {name.replace("model.", "decoder.", 1): value for name, value in load_file(path).items()}
            save_file(tensors, tmp_path / "renamed" / "model.safetensors")
        elif "index" not in path.name:
            (tmp_path / "renamed" / path.name).symlink_to(path)
    arguments = [str(tmp_path / "renamed"), "float32", "1"]
    with pytest.raises(ServerUnavailableError, match="did not find"):
        Worker(
            "transformers", "client.bench.peers.transformers_worker", arguments, folders=(), threads=1,
            log=tmp_path / "log",
        )  # fmt: skip


def test_a_worker_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ServerUnavailableError, match=r"ended with 1: .*No module named"):
        Worker("no such engine", "client.bench.peers.nothing", [], folders=(), threads=1, log=tmp_path / "log")


@pytest.mark.parametrize("text", ["int4:32", "int8:128", "int4:64:asymmetric", "fp32", "int4:0"])
def test_precisions_are_read_as_they_are_written(text: str) -> None:
    precision, settings = read_label(text)
    assert label(precision) == text
    assert not settings


def test_settings_follow_a_precision() -> None:
    precision, settings = read_label("int4:128@prefill_chunk=256,name=value")
    assert precision == Precision("int4", 128)
    assert settings == {"prefill_chunk": 256, "name": "value"}


def test_a_precision_without_a_block_size_is_what_is_built_by_default() -> None:
    assert [label(read_label(name)[0]) for name in ("int4", "int8")] == ["int4:128", "int8:32"]


@pytest.mark.parametrize("text", ["int5", "int4:big", "int4:32:odd", "int4:33", "int4:32@prefill_chunk"])
def test_what_is_no_precision_is_refused(text: str) -> None:
    with pytest.raises(BuildError):
        read_label(text)


def test_errors_are_means_over_positions() -> None:
    rows, other = np.array([[1, 0], [1, 1]], np.float32), np.array([[1, 0], [1, -1]], np.float32)
    assert cosine(rows, other) == pytest.approx(0.5)
    assert cosine(rows, 3 * rows) == pytest.approx(1)
    assert relative_error(rows, other) == pytest.approx(2**0.5 / 2)
    assert relative_error(rows, rows) == 0


def test_ratios_are_taken_within_a_round() -> None:
    def engine(name: str, decode: list[float], prefill: list[float]) -> dict[str, Any]:
        return {"engine": name, "decode_runs_tokens_per_s": {"1": decode}, "prefill_runs_tokens_per_s": prefill}

    # The machine was half as fast in the second round; medians by themselves would say 1.
    engines = [engine("wicore int4:32", [20, 10, 10], [1, 1, 1]), engine("llama.cpp q4_0", [10, 5, 20], [2, 2, 2])]
    assert ratios(engines) == [
        {"engine": "wicore int4:32", "peer": "llama.cpp q4_0", "speed": {"1": 2.0, "prefill": 0.5}}
    ]
