"""The OpenAPI document is true: schemathesis asks what it allows, and what it does not."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from client.server.gateway import Gateway

CHECKS = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]


def small(case: Any) -> None:
    """A short answer: what is tried is the shape of requests, and a model takes its time."""
    if isinstance(case.body, dict):
        case.body.pop("stream", None)
        if isinstance(case.body.get("max_tokens"), int) or "max_tokens" not in case.body:
            case.body["max_tokens"] = 1
        case.body.pop("max_completion_tokens", None)
        if isinstance(case.body.get("n"), int):
            case.body["n"] = min(case.body["n"], 2)


def operations(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [(method.upper(), path) for path, item in document["paths"].items() for method in item]


def test_every_endpoint_is_in_the_document(http: httpx.Client) -> None:
    assert set(operations(http.get("/openapi.json").json())) == {
        ("GET", "/health/live"),
        ("GET", "/health/ready"),
        ("GET", "/metrics"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{name}"),
        ("GET", "/v1/stats"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/inference"),
        ("GET", "/v1/sessions/{name}"),
        ("POST", "/v1/sessions/{name}"),
        ("DELETE", "/v1/sessions/{name}"),
    }


POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
BODIES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/inference")


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        ("GET", "/v1/models/{name}", POSITIVE),  # any text is a name
        ("GET", "/v1/stats", POSITIVE),
        *((method, "/v1/sessions/{name}", POSITIVE) for method in ("GET", "POST", "DELETE")),
        ("POST", "/v1/sessions/{name}", NEGATIVE),
        *(("POST", path, mode) for path in BODIES for mode in (POSITIVE, NEGATIVE)),
    ],
)
def test_no_request_gets_a_server_error_or_an_answer_of_another_shape(
    gateway: Gateway, method: str, path: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"{gateway.address}/openapi.json")
    strategy = schema[path][method].as_strategy(generation_mode=mode)
    checks = [getattr(schemathesis.checks, name) for name in CHECKS]

    @settings(
        max_examples=25, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None
    )
    @given(st.data())
    def ask(data: st.DataObject) -> None:
        case = data.draw(strategy)
        small(case)
        case.call_and_validate(base_url=gateway.address, checks=checks, timeout=60)

    ask()
