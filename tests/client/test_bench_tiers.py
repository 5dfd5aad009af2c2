"""`wicore bench tiers` measures on the real disk; how fast that is is nobody's business here."""

import json
from pathlib import Path

from typer.testing import CliRunner

from client.commands.app import app


def test_bench_tiers_reads_and_writes_what_it_reports_and_leaves_nothing_behind(tmp_path: Path) -> None:
    options = ["--folder", str(tmp_path), "--mib", "64", "--tail-kib", "5000", "--rounds", "1"]
    found = CliRunner().invoke(app, ["bench", "tiers", *options, "--json"], catch_exceptions=False)
    runs = json.loads(found.stdout)["runs"]
    assert [(run["entries"], run["count"], run["entry_bytes"]) for run in runs] == [
        ("blocks", 128, 2**19),
        ("tails", 13, 5_120_000),
    ]
    for run in runs:
        assert len(run["bytes_per_s"]) == 7
        assert min(*run["bytes_per_s"].values(), run["start_s"]) > 0
        assert run["of_raw"]["read"] == run["bytes_per_s"]["tier read"] / run["bytes_per_s"]["raw read"]
    assert list(tmp_path.iterdir()) == []


def test_bench_tiers_prints_a_table(tmp_path: Path) -> None:
    options = ["--folder", str(tmp_path), "--mib", "64", "--block-kib", "2000", "--tail-kib", "3001", "--rounds", "1"]
    printed = CliRunner().invoke(app, ["bench", "tiers", *options], catch_exceptions=False).stdout
    for name in ("blocks: write", "tails: read one by one", "checksum", "start with", "arena"):
        assert name in printed
