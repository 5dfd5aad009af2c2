"""The gateway's Prometheus metrics. Names follow the field's: seconds and tokens as base units, ``_total`` counters."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from client.answer import Usage
from client.gateway.histogram import TokenHistogram

FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
HTTP_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 600.0)
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)


class Metrics:
    """One gateway's, in a registry of its own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each
        self.registry = CollectorRegistry()
        self._http = Counter(
            "wicore_http_requests", "HTTP requests", ("method", "handler", "status"), registry=self.registry
        )
        self._http_s = Histogram(
            "wicore_http_request_duration_seconds",
            "Time of HTTP requests, streams to their end",
            ("handler",),
            buckets=HTTP_S,
            registry=self.registry,
        )
        self.in_flight = Gauge("wicore_gateway_requests_in_flight", "Answers being made", registry=self.registry)
        self.first_token_s = Histogram(
            "wicore_time_to_first_token_seconds",
            "From a request's arrival at the gateway to its first token",
            buckets=FIRST_TOKEN_S,
            registry=self.registry,
        )
        self.inter_token_s = TokenHistogram(
            "wicore_inter_token_latency_seconds", "Time between tokens of one answer", INTER_TOKEN_S, self.registry
        )
        self.request_s = Histogram(
            "wicore_e2e_request_latency_seconds",
            "From a request's arrival to the end of its answers",
            buckets=REQUEST_S,
            registry=self.registry,
        )
        self.prompt_tokens = Counter("wicore_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.generation_tokens = Counter("wicore_generation_tokens", "Tokens of answers", registry=self.registry)
        self.cached_tokens = Counter(
            "wicore_cached_prompt_tokens", "Prompt tokens taken from the KV cache", ("tier",), registry=self.registry
        )
        self.prompt_length = Histogram(
            "wicore_request_prompt_tokens", "Tokens of one prompt", buckets=TOKENS, registry=self.registry
        )
        self.answer_length = Histogram(
            "wicore_request_generation_tokens", "Tokens of one answer", buckets=TOKENS, registry=self.registry
        )
        self.ended = Counter(
            "wicore_requests_ended", "Answers by how they ended", ("finish_reason",), registry=self.registry
        )

    def http(self, method: str, handler: str, status: int, seconds: float) -> None:
        """An HTTP request has ended."""
        known = method if method in ("GET", "POST", "HEAD", "OPTIONS") else "other"
        self._http.labels(known, handler, str(status)).inc()
        self._http_s.labels(handler).observe(seconds)

    def used(self, usage: Usage, *, first: bool) -> None:
        """An answer has ended; the prompt counts with the ``first``, whatever the number of its answers."""
        self.generation_tokens.inc(usage.completion_tokens)
        self.answer_length.observe(usage.completion_tokens)
        if first:
            self.prompt_tokens.inc(usage.prompt_tokens)
            self.prompt_length.observe(usage.prompt_tokens)
            for tier, tokens in usage.cached_tokens.items():
                self.cached_tokens.labels(tier).inc(tokens)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
