"""`wicore bench resume` on the demo model: a conversation that goes on after a restart, and the disk it came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.bench.resume import plain_reads, resume_text
from client.commands.app import app


def test_a_short_conversation_is_resumed_with_the_same_tokens_and_its_disk_is_read_plainly(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WICORE_CPU_KERNELS", "onnxruntime")  # ours are compiled first
    short = ["--turns", "2", "--words", "60", "--answer-tokens", "4", "--rounds", "1", "--disk-gb", "0.05", "--json"]
    run = CliRunner().invoke(
        app, ["bench", "resume", "--repository", str(repository), "--folder", str(tmp_path), *short]
    )
    found = json.loads(run.stdout)
    (restart,) = found["rounds"]
    assert restart["same_tokens"]
    assert restart["loaded_bytes"] > 0
    assert 0 < restart["load_share"] < 1
    assert len(found["disk_reads_bytes_per_s"]) >= 1
    assert min(found["disk_reads_bytes_per_s"]) > 0
    assert "plain reads of the same files" in resume_text(found)


def test_a_plain_read_covers_every_file_and_as_many_passes_as_make_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.bench.resume.PLAIN_BYTES", 2**20)
    assert plain_reads(tmp_path) == []
    for number in range(2):
        (tmp_path / f"{number}.segment").write_bytes(bytes(2**17))
    assert len(plain_reads(tmp_path)) == 4
