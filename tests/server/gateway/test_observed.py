"""`wicore serve` as its operators watch it: traces at an OTLP collector, and logs of one JSON object a line."""

from __future__ import annotations

import gzip
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from builders.demo.evaluate import sample_picture
from python_backends.config import Config
from python_backends.errors import ConfigError
from tests.server.gateway.serving import CHAT, wicore_serve
from tests.server.gateway.test_openai_sdk import data_url

STEPS = {"generate", "tokenizer", "image_processor", "vision_encoder", "decoder", "queue", "prefill", "decode"}
SLACK_NS = 5_000_000
"""Clocks of several processes are compared."""


@dataclass(frozen=True)
class Seen:
    """A span that arrived."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    failed: bool
    attributes: dict[str, Any]


@dataclass
class Collector:
    """An OTLP/HTTP receiver."""

    spans: list[Seen] = field(default_factory=list)
    port: int = 0

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            (service,) = [
                each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
            ]
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                values = {each.key: each.value for each in span.attributes}
                found = {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}
                ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                times = (span.start_time_unix_nano, span.end_time_unix_nano)
                self.spans.append(Seen(span.name, service, *ids, *times, span.status.code == 2, found))

    def trace(self, trace_id: str, enough: int) -> list[Seen]:
        """Its spans, once so many are there."""
        deadline = time.monotonic() + 15
        while len(found := [span for span in self.spans if span.trace_id == trace_id]) < enough:
            assert time.monotonic() < deadline, sorted(span.name for span in found)
            time.sleep(0.05)
        return found


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            assert self.headers["Content-Type"] == "application/x-protobuf"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.take(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield made
        server.shutdown()
        thread.join()


@dataclass(frozen=True)
class Watched:
    """A running server and what it writes."""

    address: str
    log: Path
    told: Path


@pytest.fixture(scope="module")
def watched(
    collector: Collector, repository: Path, tmp_path_factory: pytest.TempPathFactory, cache_folder: Path
) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    keys = {"WICORE_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}", "WICORE_LOG_FORMAT": "json"}
    with (
        (folder / "told").open("w", encoding="utf-8") as told,
        wicore_serve(repository, "--log", str(folder / "log"), env={**os.environ, **keys}, stderr=told) as (_, ready),
    ):
        yield Watched(ready["gateway"], folder / "log", folder / "told")


def ask(watched: Watched, flags: str = "01", **more: Any) -> tuple[httpx.Response, str]:
    """An answer about a picture that was not seen before, and the trace that its client began."""
    picture, question, _ = sample_picture(secrets.randbelow(10_000))
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 12, **more}
    trace_id = secrets.token_hex(16)
    headers = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-{flags}"}
    return httpx.post(watched.address + CHAT, json=body, headers=headers, timeout=60), trace_id


@pytest.mark.effect("otlp_endpoint")
def test_a_request_is_one_trace_from_the_gateway_through_every_stage(watched: Watched, collector: Collector) -> None:
    """By the key otlp_endpoint."""
    answer, trace_id = ask(watched)
    assert answer.status_code == 200
    spans = collector.trace(trace_id, 9)
    by_name = {span.name: span for span in spans}
    assert len(spans) == len(by_name)
    assert set(by_name) == {f"POST {CHAT}", *STEPS}
    parents = {span.name: next((each.name for each in spans if each.span_id == span.parent_id), "") for span in spans}
    stages = dict.fromkeys(("tokenizer", "image_processor", "vision_encoder", "decoder"), "generate")
    inner = dict.fromkeys(("queue", "prefill", "decode"), "decoder")
    assert parents == {f"POST {CHAT}": "", "generate": f"POST {CHAT}", **stages, **inner}
    for span in spans:
        outer = by_name.get(parents[span.name], span)
        assert outer.start_ns - SLACK_NS <= span.start_ns <= span.end_ns <= outer.end_ns + SLACK_NS, span.name
    assert by_name["queue"].end_ns <= by_name["prefill"].start_ns + SLACK_NS
    assert by_name["prefill"].end_ns <= by_name["decode"].start_ns + SLACK_NS
    assert {span.service for span in spans} == {f"wicore-{name}" for name in ("gateway", *stages)}
    assert not any(span.failed for span in spans)
    usage = answer.json()["usage"]
    decoder = by_name["decoder"].attributes
    assert decoder["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert by_name["tokenizer"].attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert by_name[f"POST {CHAT}"].attributes["http.response.status_code"] == 200


def test_each_answer_of_a_request_has_its_own_spans(watched: Watched, collector: Collector) -> None:
    _, trace_id = ask(watched, n=2, temperature=1.0)
    decoders = [span for span in collector.trace(trace_id, 13) if span.name == "decoder"]
    assert sorted(span.attributes["wicore.answer"] for span in decoders) == [0, 1]


def test_what_fails_is_marked_where_it_fails(watched: Watched, collector: Collector) -> None:
    answer, trace_id = ask(watched, deadline_ms=1)
    assert answer.status_code == 504
    deadline, wanted = time.monotonic() + 15, {f"POST {CHAT}", "generate"}
    while not wanted <= {span.name for span in collector.trace(trace_id, 2) if span.failed}:  # sent in batches
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_client_that_does_not_sample_is_not_traced(watched: Watched, collector: Collector) -> None:
    _, unsampled = ask(watched, flags="00")
    _, sampled = ask(watched)
    collector.trace(sampled, 9)
    assert all(span.trace_id != unsampled for span in collector.spans)


@pytest.mark.effect("trace_share")
def test_the_share_of_requests_that_begin_a_trace_is_configured() -> None:
    from python_backends.tracing import Tracing

    def share(wanted: float) -> float:
        tracing = Tracing("test", Config(otlp_endpoint="http://127.0.0.1:1", trace_share=wanted))
        tracing._provider._active_span_processor._span_processors = ()  # nothing is sent
        spans = [tracing.begin("x", "", root=True) for _ in range(2000)]
        return sum(bool(span.traceparent) for span in spans) / len(spans)

    assert share(1.0) == 1.0
    assert 0.2 < share(trace_share := 0.25) < 0.3, trace_share


def test_without_an_endpoint_nothing_of_opentelemetrys_sdk_is_imported() -> None:
    code = (
        "import sys; from python_backends.tracing import Tracing; from python_backends.config import Config; "
        "import client.gateway.app; t = Tracing('x', Config()); "
        "assert t.begin('x', '00-' + 'a' * 32 + '-' + 'b' * 16 + '-01', root=True).traceparent == ''; "
        "assert 'opentelemetry.sdk' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_endpoint_without_the_extra_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from python_backends import tracing

    monkeypatch.setattr(tracing, "_MODULES", ("no_such_module.sdk",))
    with pytest.raises(ConfigError, match=r"wicore\[tracing\]"):
        tracing.check(Config(otlp_endpoint="http://127.0.0.1:4318"))


@pytest.mark.effect("log_format")
def test_logs_of_every_process_are_json_with_the_same_keys(watched: Watched) -> None:
    """By the key log_format; a request is found in them by its trace."""
    answer, trace_id = ask(watched)
    deadline = time.monotonic() + 15
    while trace_id not in watched.log.read_text(encoding="utf-8"):  # the line is written behind the answer
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lines = [json.loads(line) for line in watched.log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    told = [json.loads(line) for line in watched.told.read_text(encoding="utf-8").splitlines()]
    for line in (*lines, *told):
        assert {"time", "level", "process", "message"} <= set(line), line
        assert line["level"] in ("debug", "info", "warning", "error", "critical")
    assert {"tritonserver", "gateway", "decoder"} <= {line["process"] for line in lines}
    assert {line["process"] for line in told} <= {"serve"}
    (mine,) = [line for line in lines if line.get("trace_id") == trace_id]
    assert (mine["process"], mine["status"]) == ("gateway", 200)
    assert answer.headers["x-request-id"] == mine["request_id"]
