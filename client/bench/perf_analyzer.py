"""NVIDIA's perf_analyzer against the ensemble: getting it, running it, and reading what it measured.

Its binary is inside an old `tritonclient` wheel (later ones need a newer C library). Of the two libraries it wants
beyond the system's, the wheel that brings tritonserver has copies under other names.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.server.installation import wheel_libraries
from python_backends import contract
from python_backends.errors import BuildError, ServerUnavailableError

REQUIREMENT = "tritonclient==2.45.0"
WHEEL_SHA256 = "28b2d550bf5445ccd3f457bbcabf890db1d271924957d4d26abd431f94b078c1"
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
INPUT, EXPORT = "input.json", "export.json"


@dataclass(frozen=True)
class Workload:
    """One kind of request. Every answer has exactly ``max_tokens`` tokens, so that runs can be compared."""

    name: str
    prompt: str
    max_tokens: int
    image: bytes | None = None

    def as_input_data(self) -> str:
        """As perf_analyzer's --input-data takes it."""
        values: dict[str, Any] = {
            "text_input": [self.prompt],
            "max_tokens": [self.max_tokens],
            "temperature": [0.0],
            "ignore_eos": [True],
            "stream": [True],
        }
        if self.image is not None:
            values["image"] = {"content": [base64.b64encode(self.image).decode()], "shape": [1]}
        return json.dumps({"data": [values]})


@dataclass(frozen=True)
class Measurement:
    """One workload at one concurrency. Times are milliseconds, throughputs per second over the whole window."""

    workload: str
    concurrency: int
    requests: int
    failed: int
    requests_per_s: float
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    latency_p50_ms: float
    latency_p99_ms: float
    token_p50_ms: float
    """Time per token after the first; the median over requests."""


def install(folder: Path) -> Path:
    """Put perf_analyzer and its libraries into ``folder`` where they are not yet; returns the binary.

    Raises:
        BuildError: it cannot be downloaded, or does not run on this system.
    """
    binary = folder / "bin" / "perf_analyzer"
    if not binary.exists():
        folder.mkdir(parents=True, exist_ok=True)
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*pip, "--require-hashes", "--upgrade", "--target", str(folder), "--requirement", str(wanted)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise BuildError(f"cannot install perf_analyzer (it is inside {REQUIREMENT}): {reason}")
    binary.chmod(0o755)
    _link_libraries(folder / "lib")
    done = subprocess.run([binary, "--version"], env=_environment(binary), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()]
        raise BuildError(
            f"perf_analyzer does not run here: {lines[-1]}. It needs x86-64 Linux with glibc 2.34 or later, OpenSSL 3, "
            "and the libraries of Debian's libb64-0d and of the package nvidia-cuda-runtime-cu12 on LD_LIBRARY_PATH"
        )
    return binary


def _link_libraries(folder: Path) -> None:
    libraries = wheel_libraries()
    if libraries is None:
        return  # inside NVIDIA's container the system has them
    folder.mkdir(exist_ok=True)
    for name, pattern in LIBRARIES.items():
        for found in libraries.glob(pattern):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(found)


def _environment(binary: Path) -> dict[str, str]:
    ours, found = str(binary.parents[1] / "lib"), os.environ.get("LD_LIBRARY_PATH")
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join([ours, *([found] if found else [])])}


def measure(
    binary: Path, address: str, workloads: Sequence[Workload], concurrencies: Sequence[int], min_requests: int
) -> Iterator[Measurement]:
    """Run every workload at every concurrency, one after the other.

    Raises:
        ServerUnavailableError: perf_analyzer could not measure; its last line says why.
    """
    with tempfile.TemporaryDirectory(prefix="wicore-bench-") as scratch:
        for workload, concurrency in itertools.product(workloads, concurrencies):
            export = Path(scratch) / EXPORT
            export.unlink(missing_ok=True)
            (Path(scratch) / INPUT).write_text(workload.as_input_data(), encoding="utf-8")
            command = _command(binary, address, Path(scratch), concurrency, min_requests)
            done = subprocess.run(command, env=_environment(binary), capture_output=True, text=True, check=False)
            if not export.exists():
                said = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
                raise ServerUnavailableError(f"perf_analyzer cannot measure {address}: {said[-1].strip()}")
            # Tensors stand in the export as raw bytes, which need not be text.
            exported = json.loads(export.read_text(encoding="utf-8", errors="replace"), strict=False)
            yield read_export(exported, workload, concurrency)


def _command(binary: Path, address: str, scratch: Path, concurrency: int, min_requests: int) -> list[str | Path]:
    return [
        binary,
        *("-m", contract.ENSEMBLE, "-u", address, "-i", "grpc", "--streaming", "--async"),
        *("--input-data", scratch / INPUT, "--profile-export-file", scratch / EXPORT),
        *("--concurrency-range", str(concurrency)),
        *("--measurement-mode", "count_windows", "--measurement-request-count", str(max(min_requests, concurrency))),
        # Without a steady window it exports nothing; the percentiles below are ours and show the spread.
        *("--stability-percentage", "999", "--max-trials", "4"),
    ]


def read_export(exported: Mapping[str, Any], workload: Workload, concurrency: int) -> Measurement:
    """Figures from perf_analyzer's profile export: per request the times (ns) of its sending and of every response.

    Raises:
        ServerUnavailableError: not one request was answered.
    """
    requests = [entry for experiment in exported["experiments"] for entry in experiment["requests"]]
    answered = [entry for entry in requests if len(entry["response_timestamps"]) > 1 or workload.max_tokens == 1]
    answered = [entry for entry in answered if entry["response_timestamps"]]
    if not answered:
        raise ServerUnavailableError(f"no {workload.name} request was answered; the server's log says why")
    sent = np.array([entry["timestamp"] for entry in answered]) / 1e6
    first = np.array([entry["response_timestamps"][0] for entry in answered]) / 1e6
    last = np.array([entry["response_timestamps"][-1] for entry in answered]) / 1e6
    seconds = (last.max() - sent.min()) / 1e3
    return Measurement(
        workload=workload.name,
        concurrency=concurrency,
        requests=len(answered),
        failed=len(requests) - len(answered),
        requests_per_s=len(answered) / seconds,
        tokens_per_s=len(answered) * workload.max_tokens / seconds,
        ttft_p50_ms=float(np.percentile(first - sent, 50)),
        ttft_p99_ms=float(np.percentile(first - sent, 99)),
        latency_p50_ms=float(np.percentile(last - sent, 50)),
        latency_p99_ms=float(np.percentile(last - sent, 99)),
        token_p50_ms=float(np.percentile((last - first) / max(1, workload.max_tokens - 1), 50)),
    )
