"""NVIDIA's load generators run against the server: perf_analyzer against the ensemble, aiperf against the gateway."""

from __future__ import annotations

import json
import os
import shutil
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


@pytest.mark.soak
def test_aiperf_agrees_with_our_closed_loop(repository: Path) -> None:
    """But for the first token, which aiperf counts from before its event loop comes to write the request."""
    program = os.environ.get("AIPERF") or shutil.which("aiperf")
    if program is None:
        pytest.skip("no aiperf on PATH or in AIPERF; it wants an environment of its own")
    options = ["--repository", str(repository), "--aiperf", program, "--repeats", "3"]
    command = [sys.executable, "-m", "client.cli", "bench", "aiperf", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    theirs, ours = found["aiperf"]["median"], found["ours"]["median"]
    for name in ("inter_token_p50_ms", "request_p50_ms"):
        assert theirs[name] == pytest.approx(ours[name], rel=0.25), name
