"""The gateway's process: a socket, uvicorn, and an end that loses no answer.

`python -m client.gateway.server` reads `GatewaySettings` as JSON from standard input and writes one line of JSON to
standard output when it listens. SIGTERM: no new request is taken, those in flight get `drain_s`; a second one ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sys
from types import FrameType

import uvicorn

from client.gateway import http_protocol
from client.gateway.app import create_app
from client.gateway.lifecycle import Lifecycle
from client.gateway.settings import GatewaySettings
from python_backends import logs
from python_backends.errors import ServerStartError

CLOSE_S = 3
"""What connections get to close after the last answer."""


class GatewayServer(uvicorn.Server):
    """uvicorn, but for how it ends: it keeps listening while it drains, so that new requests are told so."""

    def __init__(self, settings: GatewaySettings, lifecycle: Lifecycle) -> None:
        self._settings = settings
        self._lifecycle = lifecycle
        self._loop = asyncio.get_running_loop()
        self._drain: asyncio.Task[None] | None = None
        config = uvicorn.Config(
            create_app(settings, lifecycle),
            http=http_protocol.HttpProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=http_protocol.MAX_HEADER_BYTES,
            timeout_keep_alive=int(settings.config.keep_alive_s),
            timeout_graceful_shutdown=CLOSE_S,
            limit_concurrency=settings.config.max_connections,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so: from here on signals are heard."""
        await super().startup(sockets)
        for listener in sockets or ():
            told = {"event": "listening", "port": listener.getsockname()[1], "pid": os.getpid()}
            print(json.dumps(told), flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal; the first drains, the second ends."""
        if self._drain is None and not self.should_exit:
            self._loop.call_soon_threadsafe(self._begin_drain)
        else:
            self.should_exit = self.force_exit = True

    def _begin_drain(self) -> None:
        self._drain = self._loop.create_task(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        await self._lifecycle.drain(self._settings.config.drain_s)
        self.should_exit = True


def listen(settings: GatewaySettings) -> socket.socket:
    """A listening socket.

    Raises:
        ServerStartError: the port is taken or not allowed, or the host is not this machine.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        family, kind, protocol, _, address = found[0]
        # asyncio turns Nagle's algorithm off only where the protocol is named; with it, a first token waits 40 ms.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        raise ServerStartError(
            f"the gateway cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; choose another "
            "port with --gateway-port PORT (0 picks a free one)"
        ) from error
    return listener


async def serve(settings: GatewaySettings) -> None:
    """Listen and serve until a signal."""
    listener = listen(settings)
    await GatewayServer(settings, Lifecycle()).serve(sockets=[listener])


def main() -> None:
    """Entry point of the process."""
    settings = GatewaySettings.from_json(sys.stdin.readline())
    logs.start("gateway", settings.config.log_format)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.config.max_connections + 256
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, hard)), hard))
    try:
        asyncio.run(serve(settings))
    except ServerStartError as error:
        print(json.dumps({"event": "failed", "message": error.message}), flush=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
