"""HTTP/1.1 as uvicorn speaks it, with what it leaves out: a time limit for headers, and errors in JSON.

uvicorn's h11 protocol is the one with a bound on the size of headers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from client.gateway import errors
from python_backends.errors import OverloadedError

log = logging.getLogger("wicore.gateway")

MAX_HEADER_BYTES = 32 * 2**10
MAX_HEADERS = 128
HEADER_TIMEOUT_S = 10.0
LINGER_S = 2.0
"""How long what a refused client still sends is read."""
UNREAD_S = 60
"""When the kernel gives up a connection whose peer takes nothing (TCP_USER_TIMEOUT, tcp(7))."""
EVENTS = "wicore.events"
"""ASGI extension: writes an event of a stream that has begun, past the layers that only pass it on.

A function of the bytes of an event; False where it did not write them, since the peer is slow to read or has gone: they
are to be sent as any other body then. Only where the peer speaks HTTP/1.1."""


class HttpProtocol(H11Protocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """uvicorn's own answer to one connection too many is plain text without ``Retry-After``."""
        super().__init__(*args, **kwargs)
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection that sends nothing holds a place, so its time runs from here."""
        self._header_timer: asyncio.TimerHandle | None = None
        self._refused = False
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_S * 1000)
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """The time of a request's headers runs from their first byte."""
        if self._refused:  # read and thrown away, or the answer would be lost with the connection
            return
        self.app = self._serve
        if self._max_connections is not None and len(self.connections) > self._max_connections:
            log.warning("more than %d connections", self._max_connections)
            self.app = _FULL
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer has gone."""
        self._stop_header_timer()
        super().connection_lost(exc)

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"] = {EVENTS: self._write_event} if scope["http_version"] == "1.1" else {}
        await self.config.loaded_app(scope, receive, send)

    def _write_event(self, data: bytes) -> bool:
        """As h11 would write it: a response of HTTP/1.1 without a length is chunked (RFC 9112, section 7.1)."""
        if self.flow.write_paused or self.cycle.disconnected or self.transport.is_closing():
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def _watch_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop_header_timer()
        elif self._header_timer is None and self.timeout_keep_alive_task is None:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._on_header_timeout)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _on_header_timeout(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing() and self.conn.our_state is h11.IDLE:
            self._refuse(408, f"no complete request within {HEADER_TIMEOUT_S:g} s")

    def send_400_response(self, msg: str) -> None:
        """Called while h11's exception is handled, which knows the status."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        text = f"the headers are larger than {MAX_HEADER_BYTES} bytes" if status == 431 else f"no valid HTTP: {error}"
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()  # in the middle of an answer nothing else can be said
                return
        self._refuse(status, text)

    def _refuse(self, status: int, message: str) -> None:
        content = json.dumps(_error(status, message)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
        ]
        reason = STATUS_PHRASES.get(status, b"")
        events = (h11.Response(status_code=status, headers=headers, reason=reason), h11.Data(content))
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in (*events, h11.EndOfMessage())))
        self._refused = True
        self._stop_header_timer()
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)


_FULL: Any = errors.response(
    OverloadedError("as many connections are open as this server may have; try again in a moment"),
    {"Connection": "close"},
)


def _error(status: int, message: str) -> dict[str, Any]:
    codes = {408: "request_timeout", 431: "headers_too_large"}
    return errors.body(status, message, codes.get(status, "invalid_http"))
