"""`wicore build` on the command line: text for people, JSON for scripts, exit codes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from typer.testing import CliRunner

from builders.cli import build
from builders.published_configs import PUBLISHED
from builders.random_checkpoint import write_random_checkpoint
from python_backends import manifest
from tests.builders.checkpoint_files import add_tokenizer, complete

app = typer.Typer()
app.command()(build)


def _run(*arguments: object, code: int = 0) -> click.testing.Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return complete(tmp_path / "checkpoint", "270m")


def test_the_summary_names_precision_sizes_time_and_memory(checkpoint: Path, tmp_path: Path) -> None:
    said = _run(checkpoint, "--repository", tmp_path / "repository", "--precision", "int4", "--block-size", 16).stdout
    for part in ("checkpoint, int4 (block 16)", "tokenizer", "decoder", "of weights read", "peak memory"):
        assert part in said
    again = _run(checkpoint, "--repository", tmp_path / "repository", "--precision", "int4", "--block-size", 16).stdout
    assert "is up to date: checkpoint, int4 (block 16)" in again


def test_json_is_one_object_that_agrees_with_the_manifest(checkpoint: Path, tmp_path: Path) -> None:
    arguments = (checkpoint, "--repository", tmp_path / "repository", "--asymmetric", "--max-context", 100, "--json")
    values: dict[str, Any] = json.loads(_run(*arguments).stdout)
    found = manifest.load(tmp_path / "repository")
    assert (values["status"], values["build_id"]) == ("built", found.build_id)
    assert values["artifact_bytes"] == sum(file.size for stage in found.stages.values() for file in stage.files)
    assert values["peak_memory_bytes"] > values["checkpoint_bytes"] > 0
    assert (found.precision, found.symmetric, found.model.max_context_length) == ("int8", False, 100)
    assert json.loads(_run(*arguments).stdout)["status"] == "up-to-date"
    assert json.loads(_run(*arguments, "--force").stdout)["status"] == "built"


@pytest.mark.parametrize(("precision", "block"), [("int4", 128), ("int8", 32)])
def test_each_precision_has_a_block_size_of_its_own(
    checkpoint: Path, tmp_path: Path, precision: str, block: int
) -> None:
    arguments = (checkpoint, "--repository", tmp_path / "repository", "--precision", precision, "--json")
    assert json.loads(_run(*arguments).stdout)["block_size"] == block
    assert manifest.load(tmp_path / "repository").block_size == block


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runtime", "cuda"), "runtime 'cuda' is not offered"),
        (("--precision", "fp8"), "onnxruntime has no precision 'fp8'"),
        (("--block-size", "31"), "block size 31 is not a power of two"),
        (("--max-context", "0"), "a context of 0 tokens is outside"),
    ],
)
def test_what_cannot_be_built_exits_with_one_and_says_why(
    checkpoint: Path, tmp_path: Path, arguments: tuple[str, str], message: str
) -> None:
    common = (checkpoint, "--repository", tmp_path / "repository", *arguments)
    assert message in _run(*common, code=1).stderr
    error = json.loads(_run(*common, "--json", code=1).stdout)["error"]
    assert error["code"] == "build"
    assert message in error["message"]


def test_an_unknown_precision_is_a_usage_error(checkpoint: Path, tmp_path: Path) -> None:
    _run(checkpoint, "--repository", tmp_path / "repository", "--precision", "int3", code=2)
    assert not (tmp_path / "repository").exists()


CHILD = """
import typer
from builders.cli import build
app = typer.Typer()
app.command()(build)
app()
"""


def test_ctrl_c_says_that_the_repository_is_as_it_was(tmp_path: Path) -> None:
    folder, repository = tmp_path / "checkpoint", tmp_path / "repository"
    text = {**PUBLISHED["270m"], "vocab_size": 200_000, "hidden_size": 1024, "num_hidden_layers": 6}
    text["layer_types"] = text["layer_types"][:6]
    write_random_checkpoint(folder, text)
    add_tokenizer(folder)
    command = [sys.executable, "-c", CHILD, str(folder), "--repository", str(repository), "--precision", "int4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        while child.poll() is None and not list(repository.glob("decoder/1/*/decoder.weights")):
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        assert child.stderr is not None
        said = child.stderr.read()
    shutil.rmtree(folder)  # half a gigabyte that pytest would keep
    assert child.returncode == 130
    assert said.endswith("wicore build: stopped; the repository is as it was\n")
    assert not list(repository.glob("*/1/*/*"))


def test_help_teaches_by_example() -> None:
    said = _run("--help").stdout
    assert "wicore build google/gemma-3-1b-it" in said
