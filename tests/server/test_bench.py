"""perf_analyzer runs against the ensemble."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from client.server import Server


@pytest.mark.soak
def test_perf_analyzer_measures_text_and_pictures(server: Server, tmp_path: Path) -> None:
    options = ["--address", server.addresses.grpc, "--tools", str(tmp_path), "--concurrency", "2", "--requests", "4"]
    command = [sys.executable, "-m", "client.cli", "bench", "triton", "--json", "--max-tokens", "8", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["measurements"]
    assert [one["workload"] for one in found] == ["text", "picture"]
    assert all(one["failed"] == 0 and one["requests"] >= 4 for one in found)
