"""One request from arrival to its last token: measured, and stopped in the engine when its caller goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from client.answer import Answer, AnswersBuilder, Piece
from client.gateway import errors
from client.gateway.http_protocol import EVENTS
from client.gateway.services import Services
from python_backends import contract
from python_backends.errors import CancelledError, InternalError, WiCoreError
from python_backends.tracing import PARAMETER

T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """What goes to Triton for one prompt: exactly one of ``prompt`` and ``messages``."""

    prompt: str | None
    messages: Sequence[Mapping[str, Any]] | None
    images: Sequence[bytes]
    options: Mapping[str, Any]
    """`client.request.Options`, and inputs of the contract that it does not name."""
    request_id: str
    traceparent: str = ""
    """The trace that the request belongs to; none: it is not traced."""
    arrived_s: float = field(default_factory=time.perf_counter)


def triton_id(request: Request) -> str:
    """The request's name in Triton: its own, made unique."""
    return f"{request.state.request_id}-{secrets.token_hex(4)}"


def trace_of(request: Request) -> str:
    """The trace that the request belongs to; empty where it is not traced."""
    return getattr(request.state, PARAMETER, "")


async def pieces(services: Services, ask: Ask) -> AsyncGenerator[Piece, None]:
    """The answers' pieces as they come, counted. Closing the generator stops the request.

    Raises:
        WiCoreError: as `client.AsyncClient.stream`.
    """
    metrics = services.metrics
    last_s: dict[int, float] = {}
    options = dict(ask.options)
    span = services.tracing.begin("generate", ask.traceparent, wicore__request_id=ask.request_id)
    if span.traceparent:
        options[PARAMETER] = span.traceparent
    if services.triton.line.name:
        options[contract.LINE] = services.triton.line.name
    stream = services.triton.client.stream(
        ask.prompt, messages=ask.messages, images=ask.images, request_id=ask.request_id, **options
    )
    with metrics.in_flight.track_inprogress():
        try:
            async with aclosing(stream):
                async for piece in stream:
                    now = time.perf_counter()
                    if not last_s:
                        span.event("first token")
                    _observe(services, piece, now, ask.arrived_s, last_s)
                    yield piece
        except (WiCoreError, asyncio.CancelledError) as error:
            span.fail(error)
            raise
        finally:
            span.end()
            seconds = time.perf_counter() - ask.arrived_s
            metrics.request_s.observe(seconds)
            services.monitor.request.add(seconds)


def _observe(services: Services, piece: Piece, now: float, arrived_s: float, last_s: dict[int, float]) -> None:
    """A piece came ``now``; ``last_s`` remembers when each of the n answers last had one."""
    metrics, monitor = services.metrics, services.monitor
    before = last_s.get(piece.index)
    count = len(piece.token_ids)
    if before is None:
        if not last_s:
            metrics.first_token_s.observe(now - arrived_s)
            monitor.first_token.add(now - arrived_s)
    elif count:
        each = (now - before) / count  # tokens that came together (drafts) share the time
        metrics.inter_token_s.observe(each, count)
        for _ in range(count):
            monitor.inter_token.add(each)
    if count or before is None:
        last_s[piece.index] = now
    if piece.finish_reason:
        metrics.ended.labels(piece.finish_reason).inc()
    if piece.usage:
        metrics.used(piece.usage, first=piece.index == 0)


async def whole(services: Services, ask: Ask) -> tuple[Answer, ...]:
    """The answers by index, with times from the request's arrival.

    Raises:
        WiCoreError: as `pieces`; also where an answer ended early.
    """
    builder = AnswersBuilder(ask.request_id)
    async with aclosing(pieces(services, ask)) as stream:
        async for piece in stream:
            builder.add(piece, time.perf_counter() - ask.arrived_s)
    return builder.finish()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, but give it up when the client goes away.

    Raises:
        CancelledError: the client went away.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise CancelledError("the client went away")
        return task.result()
    finally:
        for each in (task, watcher):
            if not each.done():
                each.cancel()
                with contextlib.suppress(asyncio.CancelledError, WiCoreError):
                    await each


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def started(services: Services, ask: Ask, request: Request) -> AsyncGenerator[Piece, None]:
    """As `pieces`, once the first is there: what is refused before it gets a status of its own.

    Raises:
        WiCoreError: as `pieces`, for a request without a first piece; CancelledError where the client went away.
    """
    stream = pieces(services, ask)
    first = await unless_gone(request.receive, anext(stream))

    async def rest() -> AsyncGenerator[Piece, None]:
        async with aclosing(stream):
            yield first
            async for piece in stream:
                yield piece

    return rest()


class EventStream(Response):
    """Server-sent events. ``events`` are JSON texts; an error on the way becomes the last one."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(None, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them; stop asking for more when the client goes away."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        write = scope.get("extensions", {}).get(EVENTS, _write_nothing)
        with contextlib.suppress(CancelledError):
            await unless_gone(receive, self._send_all(send, write))

    async def _send_all(self, send: Send, write: Callable[[bytes], bool]) -> None:
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    data = f"data: {event}\n\n".encode()
                    if not write(data):
                        await send({"type": "http.response.body", "body": data, "more_body": True})
            except WiCoreError as error:
                text = json.dumps(errors.body_of(error), ensure_ascii=False)
                await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def _write_nothing(_: bytes) -> bool:
    return False


def check_ended(reason: str) -> str:
    """OpenAI's word for how an answer ended; raises InternalError for one that has none."""
    if reason not in ("stop", "length", "tool_calls"):
        raise InternalError(f"the server ended the answer early ({reason})")
    return reason
