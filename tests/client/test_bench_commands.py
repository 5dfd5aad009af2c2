"""`wicore bench engine | serve` run to the end on a tiny random model; times are nobody's business here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from builders.build import Options, build
from builders.quantize import Precision
from builders.random_checkpoint import make_checkpoint
from client.bench.prompts import Prompts
from client.commands.app import app
from python_backends.errors import BuildError

SMALL = ["--batch", "1", "--batch", "2", "--prompt-tokens", "24", "--output-tokens", "8", "--prefill-tokens", "40"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    make_checkpoint(folder / "tiny", "tiny")
    return folder / "tiny"


@pytest.fixture(scope="module")
def repository(folder: Path, checkpoint: Path) -> Path:
    build(checkpoint, folder / "repository", Options(Precision("int8")))
    return folder / "repository"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.bench.machine.memory_bandwidth", lambda _: {"read": 1e10, "copy": 1e10})


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout


def test_bench_engine_measures_everything_it_names(repository: Path, folder: Path) -> None:
    options = ["--repository", str(repository), *SMALL, "--long-tokens", "100", "--requests", "3", "--repeats", "1"]
    options += ["--target-ms", "250"]
    plot = folder / "engine.svg"
    found: dict[str, Any] = json.loads(run("bench", "engine", *options, "--plot", str(plot), "--json"))
    assert [one["batch"] for one in found["decode"]] == [1, 2]
    assert all(one["tokens_per_s"] > 0 and one["floor_ms"] > 0 for one in found["decode"])
    assert found["prefill"]["prompt_tokens"] == 40
    assert found["closed_loop"]["requests"] == 3
    assert 0 < found["closed_loop"]["steps"]["occupancy"] <= 1
    assert found["long_prompt"]["decoding"] == 1
    assert found["long_prompt"]["before"]["tokens"] > 0
    assert found["long_prompt"]["target_inter_token_ms"] == 250
    about = found["configuration"]
    assert about["precision"] == "int8"
    assert about["max_draft"] == 0
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


def test_bench_engine_prints_a_table(repository: Path) -> None:
    options = ["--repository", str(repository), *SMALL, "--long-tokens", "0", "--requests", "2", "--repeats", "1"]
    printed = run("bench", "engine", *options)
    assert "batch 2" in printed
    assert "GB/s" in printed


def test_bench_serve_compares_triton_with_the_engine(repository: Path, folder: Path) -> None:
    options = ["--repository", str(repository), *SMALL, "--requests", "4", "--repeats", "1"]
    plot = folder / "serve.svg"
    found: dict[str, Any] = json.loads(run("bench", "serve", *options, "--plot", str(plot), "--json"))
    assert set(found["targets"]) == {"engine", "triton"}
    for values in found["targets"].values():
        assert [one["batch"] for one in values["decode"]] == [1, 2]
        assert [one["failed"] for one in (*values["closed_loop"], values["open_loop"])] == [0, 0, 0]
        assert values["prefill"]["prompt_tokens"] == 40
        for one in values["closed_loop"]:
            assert 0 < one["steps"]["occupancy"] <= 1
            assert one["steps"]["padding"] == pytest.approx(1 - one["steps"]["occupancy"])
        assert all(one["share"] > 0 for one in values["decode"])
    assert [one["batch"] for one in found["cost"]] == [1, 2]
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


def test_prompts_have_the_length_that_was_asked_for_and_differ(repository: Path) -> None:
    prompts = Prompts(repository, seed=1)
    jobs = [prompts.job(length, 4) for length in (20, 20, 64, 700)]
    assert [len(job.input_ids) for job in jobs] == [20, 20, 64, 700]
    assert jobs[0].input_ids != jobs[1].input_ids


def test_a_prompt_shorter_than_the_template_is_refused(repository: Path) -> None:
    with pytest.raises(BuildError, match="template"):
        Prompts(repository, seed=1).job(3, 4)


def test_random_checkpoint_command_tells_what_it_wrote(tmp_path: Path) -> None:
    told = json.loads(run("random-checkpoint", "tiny", str(tmp_path / "new"), "--layers", "1", "--json"))
    assert told["weight_bytes"] > 10**6
    assert (tmp_path / "new" / "tokenizer.json").exists()
