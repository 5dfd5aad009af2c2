"""Reading what perf_analyzer exports; that it runs is shown in tests/server."""

from __future__ import annotations

import base64
import json

import pytest

from client.bench.perf_analyzer import Workload, read_export
from client.commands.bench.triton import table
from python_backends.errors import ServerUnavailableError

MS = 1_000_000


def exported(*requests: tuple[int, list[int]]) -> dict[str, object]:
    entries = [
        {"timestamp": sent * MS, "response_timestamps": [at * MS for at in responses]} for sent, responses in requests
    ]
    return {"experiments": [{"requests": entries}]}


def test_figures_of_an_export() -> None:
    workload = Workload("text", "Hi", max_tokens=3)
    found = read_export(exported((0, [100, 200, 300]), (0, [100, 300, 500]), (400, [])), workload, 2)
    assert (found.workload, found.concurrency, found.requests, found.failed) == ("text", 2, 2, 1)
    assert found.requests_per_s == pytest.approx(2 / 0.5)
    assert found.tokens_per_s == pytest.approx(6 / 0.5)
    assert found.ttft_p50_ms == pytest.approx(100)
    assert found.latency_p50_ms == pytest.approx(400)
    assert found.token_p50_ms == pytest.approx(150)


def test_a_run_without_one_answer_is_an_error() -> None:
    with pytest.raises(ServerUnavailableError, match="text"):
        read_export(exported((0, [])), Workload("text", "Hi", max_tokens=3), 1)


def test_input_data_holds_the_picture_as_base64() -> None:
    data = json.loads(Workload("picture", "Hi", 3, b"\x89PNG").as_input_data())
    (values,) = data["data"]
    assert base64.b64decode(values["image"]["content"][0]) == b"\x89PNG"
    assert values["image"]["shape"] == [1]
    assert values["max_tokens"] == [3]


def test_columns_of_the_table_are_aligned() -> None:
    found = read_export(exported((0, [100, 200, 300])), Workload("text", "Hi", 3), 1)
    lines = table([found]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:3] == ["text", "1", "1"]
