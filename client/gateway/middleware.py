"""What every request passes before a router sees it: pure ASGI, outermost first as `app.create_app` lists them."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.calls import new_request_id
from client.gateway import errors
from client.gateway.http_protocol import MAX_HEADER_BYTES, MAX_HEADERS
from client.gateway.lifecycle import Lifecycle
from client.gateway.metrics import Metrics
from client.gateway.settings import GatewaySettings
from python_backends.errors import (
    InternalError,
    RequestTooLargeError,
    ServerUnavailableError,
)
from python_backends.tracing import NO_SPAN, PARAMETER, Span, Tracing

log = logging.getLogger("wicore.gateway")

REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]", "::1"))
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)


class ClientTooSlowError(Exception):
    """What was sent stays unread; the connection is given up."""


class Outermost:
    """Names the request, counts and logs it, bounds how long it may be left unread, and lets no exception out.

    The name is the client's own (``X-Request-Id``) with something random behind it, so that nobody can name, and so
    stop, somebody else's.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings, metrics: Metrics, tracing: Tracing) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = _Call(scope, send, self._settings.config.send_timeout_s)
        begin = time.perf_counter()
        span = self._begin_span(scope, call.request_id)
        try:
            refused = _refused_headers(scope, self._settings.host)
            await (refused or self._app)(scope, receive, call.send)
        except ClientTooSlowError:
            log.warning("left unread", extra={"request_id": call.request_id, "path": scope["path"]})
            raise  # uvicorn closes the connection
        except Exception:
            log.exception("unexpected failure", extra={"request_id": call.request_id, "path": scope["path"]})
            if not call.status:
                text = "the gateway failed on this request; its log has the details"
                await errors.response(InternalError(text))(scope, receive, call.send)
            else:
                raise
        finally:
            call.close()
            seconds = time.perf_counter() - begin
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.http(scope["method"], path, call.status or errors.CLIENT_CLOSED_REQUEST, seconds)
            fields = {"request_id": call.request_id, "status": call.status, "seconds": round(seconds, 4)}
            if span.trace_id:
                fields["trace_id"] = span.trace_id
                span.set(http__route=path, http__response__status_code=call.status)
                if call.status >= 500:
                    span.fail(f"status {call.status}")
            span.end()
            level = logging.DEBUG if path.startswith(("/health", "/metrics")) else logging.INFO
            log.log(level, "%s %s", scope["method"], scope["path"], extra=fields)

    def _begin_span(self, scope: Scope, request_id: str) -> Span:
        """Of a request for an answer; the rest (page, health, metrics) is not worth a trace."""
        if scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            return NO_SPAN
        given = next((value for name, value in scope["headers"] if name == PARAMETER.encode()), b"").decode("latin-1")
        span = self._tracing.begin(
            f"POST {scope['path'][:64]}", given, root=True, http__request__method="POST", wicore__request_id=request_id
        )
        scope["state"]["traceparent"] = span.traceparent
        return span


class _Call:
    """One request's way out."""

    def __init__(self, scope: Scope, send: Send, timeout_s: float) -> None:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        self.status = 0
        self.request_id = given if REQUEST_ID.fullmatch(given) else new_request_id()
        scope.setdefault("state", {})["request_id"] = self.request_id
        self._send = send
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._sending: tuple[float, asyncio.Task[object]] | None = None
        self._watchdog = self._loop.call_later(timeout_s, self._check)

    def close(self) -> None:
        """Nothing more is sent."""
        self._watchdog.cancel()

    def _check(self) -> None:
        """One timer for a request, not one for each of its tokens."""
        now = self._loop.time()
        since, task = self._sending or (now, None)
        if task is not None and now - since >= self._timeout_s:
            task.cancel(ClientTooSlowError)
        self._watchdog = self._loop.call_later(max(0.1, since + self._timeout_s - now), self._check)

    async def send(self, message: Message) -> None:
        """Pass on, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            names = {name for name, _ in message["headers"]}
            added = [(name, value) for name, value in _HEADERS if name not in names]
            message["headers"] = [*message["headers"], *added, (b"x-request-id", self.request_id.encode())]
        task = asyncio.current_task()
        assert task is not None
        self._sending = self._loop.time(), task
        try:
            await self._send(message)
        except asyncio.CancelledError as error:
            if ClientTooSlowError not in error.args:
                raise
            task.uncancel()
            raise ClientTooSlowError from None
        finally:
            self._sending = None


def _refused_headers(scope: Scope, host: str) -> Response | None:
    """Too many or too large; or, where only this machine is served, a name that is not this machine's.

    The latter is how a web page could reach a server on the loopback address (DNS rebinding).
    """
    headers = scope["headers"]
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        text = f"more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them"
        return errors.plain_response(431, text, {"Connection": "close"})
    if host in _LOOPBACK:
        named = next((value for name, value in headers if name == b"host"), b"").decode("latin-1")
        if named.rpartition(":")[0] not in _LOOPBACK and named not in _LOOPBACK:
            return errors.plain_response(421, "this server is for this machine only; call it 127.0.0.1 or localhost")
    return None


class Draining:
    """Counts what is in flight, and refuses new requests once the gateway is to end; health is told all the same."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"].startswith(("/health/", "/metrics")):
            await self._app(scope, receive, send)
        elif self._lifecycle.draining:
            error = ServerUnavailableError("the server is shutting down; ask again in a moment, or ask another")
            await errors.response(error, {"Connection": "close"})(scope, receive, send)
        else:
            with self._lifecycle.request():
                await self._app(scope, receive, send)


class BodyReader:
    """Reads a body within its limits of size and time before anything looks at it, and hands it on whole."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            refused = errors.plain_response(415, "bodies are not taken compressed; leave Content-Encoding out")
            await refused(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._settings.config.body_timeout_s):
                body = await self._read(headers, receive)
        except TimeoutError:
            text = "the body did not arrive in time; send it in one go"
            await errors.plain_response(408, text, {"Connection": "close"})(scope, receive, send)
        except RequestTooLargeError as error:
            await errors.response(error, {"Connection": "close"})(scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None where the client went away.

        What is too large is read to its end all the same (up to twice the limit) and thrown away: an answer to a client
        that is still sending would be lost with the connection.
        """
        limit = self._settings.config.max_body_bytes
        announced = headers.get(b"content-length", b"0")
        parts: list[bytes] = []
        size, most = 0, 2 * limit
        too_large = announced.isdigit() and int(announced) > limit
        if too_large and int(announced) > most:
            raise _too_large(limit)
        while True:
            async with asyncio.timeout(self._settings.config.idle_timeout_s):
                message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            too_large = too_large or size > limit
            if too_large:
                parts.clear()
            else:
                parts.append(message.get("body", b""))
            if not message.get("more_body", False) or size > most:
                break
        if too_large:
            raise _too_large(limit)
        return b"".join(parts)


def _too_large(limit: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"the body is larger than {limit:,} bytes; send smaller or fewer pictures, or raise max_body_bytes"
    )


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """The body as one message, then whatever comes: the client's leaving."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
