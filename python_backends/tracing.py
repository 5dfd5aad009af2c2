"""OpenTelemetry traces of a request, from the gateway through Triton's stages; off without ``otlp_endpoint``.

The gateway begins a trace, or goes on with its client's (``traceparent``, W3C Trace Context). What it asks of Triton
carries the header's value as the request parameter of that name, which an ensemble hands to every stage; a stage that
finds it adds spans of its own. Nothing of OpenTelemetry is imported while it is off, and it is an extra of the package.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from python_backends.config import Config
from python_backends.errors import ConfigError

PARAMETER = "traceparent"
"""Of a request to Triton, and the HTTP header."""
FLUSH_MS = 1000
"""How long an ended span may wait for others to be sent with."""
_MODULES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def check(config: Config) -> None:
    """See that what the configuration asks for is installed.

    Raises:
        ConfigError: it is not.
    """
    if not config.otlp_endpoint:
        return
    for name in _MODULES:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # of a package above it
            found = None
        if found is None:
            raise ConfigError(
                f"otlp_endpoint is set and {name} is not installed; pip install 'wicore[tracing]', or leave it out"
            )


class Span:
    """One piece of work; all of it does nothing where no trace is kept. Times are seconds of `time.monotonic`."""

    def __init__(self, span: Any = None, offset_s: float = 0.0) -> None:
        self._span = span
        self._offset_s = offset_s

    @property
    def traceparent(self) -> str:
        """For what is done on its behalf elsewhere; empty where nothing is to be kept there."""
        if self._span is None:
            return ""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"

    @property
    def trace_id(self) -> str:
        """For logs; empty where no trace is kept."""
        return self.traceparent[3:35]

    def set(self, **attributes: Any) -> None:
        """Add attributes; ``__`` in their names stands for a dot."""
        if self._span is not None:
            self._span.set_attributes(_named(attributes))

    def event(self, name: str) -> None:
        """Something happened now."""
        if self._span is not None:
            self._span.add_event(name)

    def fail(self, error: BaseException | str) -> None:
        """It did not work."""
        if self._span is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, str(error)))

    def end(self, at_s: float | None = None) -> None:
        """It is over, now or at a moment that has passed."""
        if self._span is not None:
            self._span.end(None if at_s is None else _nanoseconds(at_s, self._offset_s))


NO_SPAN = Span()


class Tracing:
    """Makes one process's spans and sends them. Cheap to make where tracing is off.

    Raises:
        ConfigError: as `check`.
    """

    def __init__(self, process: str, config: Config) -> None:
        check(config)
        self._provider: Any = None
        self._offset_s = time.time() - time.monotonic()
        if not config.otlp_endpoint:
            return
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.trace_share)),
            resource=Resource.create({"service.name": f"wicore-{process}"}),
        )
        exporter = OTLPSpanExporter(endpoint=config.otlp_endpoint.rstrip("/") + "/v1/traces", timeout=5)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=FLUSH_MS))
        self._tracer = self._provider.get_tracer("wicore")

    def begin(
        self, name: str, parent: str, *, root: bool = False, start_s: float | None = None, **attributes: Any
    ) -> Span:
        """A span that runs until its `Span.end`.

        Args:
            name: of the work.
            parent: a ``traceparent``; without a valid one there is no span, unless ``root`` begins a trace then.
            root: the span answers a request from outside; otherwise it is a step of one.
            start_s: where it began before now.
            attributes: as of `Span.set`.
        """
        if self._provider is None or not (parent or root):
            return NO_SPAN
        from opentelemetry.trace import SpanKind, get_current_span
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({PARAMETER: parent})
        if not root and not get_current_span(context).get_span_context().is_valid:
            return NO_SPAN
        span = self._tracer.start_span(
            name,
            context,
            kind=SpanKind.SERVER if root else SpanKind.INTERNAL,
            attributes=_named(attributes),
            start_time=None if start_s is None else _nanoseconds(start_s, self._offset_s),
        )
        return Span(span, self._offset_s) if span.is_recording() else NO_SPAN

    @contextmanager
    def span(self, name: str, parent: str, **attributes: Any) -> Iterator[Span]:
        """`begin` to `Span.end` around a block; an exception fails it."""
        span = self.begin(name, parent, **attributes)
        try:
            yield span
        except Exception as error:
            span.fail(error)
            raise
        finally:
            span.end()

    def close(self) -> None:
        """Send what has ended."""
        if self._provider is not None:
            self._provider.shutdown()


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in attributes.items() if value is not None}


def _nanoseconds(at_s: float, offset_s: float) -> int:
    return int((at_s + offset_s) * 1e9)
