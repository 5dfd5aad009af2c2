"""WiCore's own endpoints against the real server."""

from __future__ import annotations

import base64
import io
import json
import threading
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from builders.demo.evaluate import sample_picture
from client import Client

FIXED = {"id", "content", "token_count", "latency_ms", "gpu_utilization"}
OPTIONAL = {"finish_reason", "time_to_first_token_ms", "prompt_tokens", "cached_tokens"}


def picture_and_question(seed: int) -> tuple[bytes, str]:
    picture, question, _ = sample_picture(seed)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue(), question


def test_inference_answers_about_pictures(http: httpx.Client, client: Client) -> None:
    png, question = picture_and_question(0)
    asked = {"prompt": question, "images": [base64.b64encode(png).decode()], "max_tokens": 32, "temperature": 0.0}
    begin = time.perf_counter()
    answer = http.post("/v1/inference", json=asked).json()
    took_ms = (time.perf_counter() - begin) * 1000
    assert set(answer) == FIXED | OPTIONAL
    direct = client.generate(question, images=[png], max_tokens=32)
    assert answer["content"] == direct.text
    assert answer["token_count"] == len(direct.token_ids)
    assert answer["prompt_tokens"] == direct.usage.prompt_tokens
    assert 0 < answer["time_to_first_token_ms"] <= answer["latency_ms"] < took_ms
    assert answer["gpu_utilization"] is None or 0 <= answer["gpu_utilization"] <= 1


def test_inference_streams(http: httpx.Client) -> None:
    asked = {"prompt": "How many shapes?", "max_tokens": 16, "ignore_eos": True}
    whole = http.post("/v1/inference", json=asked).json()
    with http.stream("POST", "/v1/inference", json={**asked, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    *pieces, last = [json.loads(line) for line in lines[:-1]]
    assert len(pieces) > 1
    assert "".join(piece["content"] for piece in pieces) == last["content"] == whole["content"]
    assert set(last) == FIXED | OPTIONAL
    assert last["token_count"] == 16


def test_stats_follow_what_is_decoded(http: httpx.Client, client: Client) -> None:
    before = http.get("/v1/stats").json()
    assert before["batch"]["running"] == 0
    stop = threading.Event()

    def decode() -> None:
        for _ in client.stream("Hi", max_tokens=5000, ignore_eos=True):
            if stop.is_set():
                return

    threads = [threading.Thread(target=decode) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 10
        while (during := http.get("/v1/stats").json())["batch"]["decoding"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)
        later = http.get("/v1/stats").json()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert during["batch"]["occupancy"] == during["batch"]["running"] / during["batch"]["slots"]
    assert later["totals"]["drawn_tokens"] > before["totals"]["drawn_tokens"] + 10
    assert later["throughput"]["generation_tokens_per_s"] > 1
    assert later["batch"]["mean_rows"] > 1
    assert set(later["tiers"]) == {"device", "host", "nvme"}
    assert later["queue"]["time"]["counts"][-1] > before["queue"]["time"]["counts"][-1]


def test_latencies_are_of_what_the_gateway_answered(http: httpx.Client) -> None:
    before = http.get("/v1/stats").json()["latency_ms"]
    asked = {"prompt": "How many shapes?", "max_tokens": 9, "ignore_eos": True}
    for _ in range(3):
        http.post("/v1/inference", json=asked).raise_for_status()
    after = http.get("/v1/stats").json()["latency_ms"]
    assert after["time_to_first_token"]["count"] == before["time_to_first_token"]["count"] + 3
    assert after["request"]["count"] == before["request"]["count"] + 3
    assert after["inter_token"]["count"] > before["inter_token"]["count"]
    for kind in after.values():
        assert 0 < kind["p50"] <= kind["p90"] <= kind["p99"]


def test_metrics_count_tokens_as_usage_does(http: httpx.Client) -> None:
    def read() -> dict[str, float]:
        time.sleep(0.15)  # what the decoder told is used for a tenth of a second
        families = text_string_to_metric_families(http.get("/metrics").text)
        return {
            sample.name + "".join(f",{name}={value}" for name, value in sorted(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    before = read()
    answer = http.post("/v1/inference", json={"prompt": "Hi", "max_tokens": 7, "ignore_eos": True}).json()
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("wicore_generation_tokens_total") == 7
    assert grown("wicore_prompt_tokens_total") == answer["prompt_tokens"]
    assert grown("wicore_time_to_first_token_seconds_count") == 1
    assert grown("wicore_requests_ended_total,finish_reason=length") == 1
    assert grown("wicore_request_queue_time_seconds_count") == 1
    assert grown("wicore_decoder_drawn_tokens_total") >= 7
    assert after["wicore_decoder_slots"] >= 1
    assert after["wicore_gateway_requests_in_flight"] == 0


@pytest.mark.parametrize("body", [{}, {"prompt": 3}, {"prompt": "x", "images": "y"}, {"prompt": "x", "n": 2}])
def test_a_body_of_another_shape_is_422(http: httpx.Client, body: dict[str, object]) -> None:
    answer = http.post("/v1/inference", json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"]
