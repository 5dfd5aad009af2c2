"""What is read from aiperf's export, and that our own figures are defined as its are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from client.bench.aiperf import find, of_traces, read_export, text
from client.bench.load import Trace
from python_backends.errors import BuildError, ServerUnavailableError

EXPORT: dict[str, Any] = {
    "request_count": {"unit": "requests", "avg": 2.0},
    "time_to_first_token": {"unit": "ms", "avg": 31.0, "p50": 30.0},
    "inter_token_latency": {"unit": "ms", "avg": 4.5, "p50": 4.0},
    "request_latency": {"unit": "ms", "avg": 310.0, "p50": 300.0},
    "output_token_throughput": {"unit": "tokens/sec", "avg": 640.0},
    "request_throughput": {"unit": "requests/sec", "avg": 10.0},
    "http_req_sending": {"unit": "ms", "avg": 3.0, "p50": 1.0},
}


def test_figures_are_over_requests_as_aiperfs_are() -> None:
    slow = Trace(0.0, [0.5, 0.6, 0.9, 1.0], ended_s=1.1)
    fast = Trace(1.0, [1.1, 1.2, 1.3], ended_s=1.4)
    found = of_traces([slow, fast])
    assert found["ttft_p50_ms"] == pytest.approx((500 + 100) / 2)
    assert found["inter_token_p50_ms"] == pytest.approx((500 / 3 + 200 / 2) / 2)
    assert found["request_p50_ms"] == pytest.approx((1000 + 300) / 2)
    assert found["tokens_per_s"] == pytest.approx(7 / 1.4)
    assert found["requests_per_s"] == pytest.approx(2 / 1.4)


def test_an_export_has_the_same_figures_and_shows_beside_ours() -> None:
    theirs = read_export(EXPORT, 2)
    ours = of_traces([Trace(0.0, [0.5, 1.0], ended_s=1.0)])
    assert set(theirs) - set(ours) == {"sending_mean_ms"}
    sides = {"aiperf": theirs, "ours": ours}
    shown = text({side: {"median": found, "runs": [found]} for side, found in sides.items()}).splitlines()
    assert [line.split()[0] for line in shown[1:]] == list(theirs)
    assert "30.00 (30.00 to 30.00)" in shown[1]
    assert shown[-1].endswith("–")


def test_answers_that_are_missing_are_an_error() -> None:
    with pytest.raises(ServerUnavailableError, match="2 answers of 3"):
        read_export(EXPORT, 3)


def test_a_program_that_is_not_there_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no /.*/aiperf; .*--aiperf"):
        find(tmp_path / "aiperf")
