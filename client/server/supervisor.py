"""tritonserver and the gateway together: started in order, watched, and what has died started again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from client.server.gateway import Gateway
from client.server.options import ServerOptions
from client.server.process import POLL_S, Server
from client.server.server_log import Progress
from python_backends.errors import ServerUnavailableError

if TYPE_CHECKING:
    from client.gateway.settings import GatewaySettings

MAX_RESTARTS = 5
RESTART_WINDOW_S = 600.0


class Supervisor:
    """Also a context manager.

    Args:
        options: of Triton.
        gateway: of the gateway; None runs Triton alone.
        restart: whether what has died is started again.
        on_restart: hears what died before it is started again, and an empty text when all of it runs.
        on_progress, on_log: as of `Server`.
    """

    def __init__(
        self,
        options: ServerOptions,
        gateway: GatewaySettings | None,
        *,
        restart: bool,
        on_restart: Callable[[str], None],
        on_progress: Callable[[Progress], None] | None = None,
        on_log: Callable[[str], None] | None = None,
    ) -> None:
        self._restart = restart
        self._on_restart = on_restart
        self._on_progress = on_progress
        self._on_log = on_log
        self._settings = gateway
        self._restarts: list[float] = []
        self.server = self._new_server(options)
        self.gateway: Gateway | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start Triton, then the gateway in front of it.

        Raises:
            ServerStartError: with the reason.
        """
        self.server.start()
        if self._settings is None:
            return
        try:
            settings = dataclasses.replace(self._settings, triton=self.server.addresses.grpc)
            self.gateway = Gateway(settings, self.server.options.log_path)
            self.gateway.start()
        except BaseException:
            self.stop()
            raise

    def run(self) -> None:
        """Watch, until a signal ends it.

        Raises:
            ServerUnavailableError: something has died and is not to be started again, or died too often.
        """
        watched: list[tuple[Callable[[], None], Callable[[], None]]] = [(self._check_server, self._restart_server)]
        if self.gateway is not None:
            watched.append((self.gateway.check, self.gateway.start))
        while True:
            for check, start_again in watched:
                try:
                    check()
                except ServerUnavailableError as error:
                    self._note(error)
                    start_again()
                    self._on_restart("")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Drain the gateway while Triton still answers, then end Triton."""
        try:
            if self.gateway is not None:
                self.gateway.stop()
        finally:
            self.server.stop()

    def _note(self, error: ServerUnavailableError) -> None:
        """Raise where the death is the last word."""
        now = time.monotonic()
        self._restarts = [*(at for at in self._restarts if now - at < RESTART_WINDOW_S), now]
        if not self._restart or len(self._restarts) > MAX_RESTARTS:
            raise error
        self._on_restart(error.message)

    def _check_server(self) -> None:
        self.server.check()

    def _restart_server(self) -> None:
        """A new tritonserver on the ports of the old one, which the gateway and other clients know."""
        self.server.stop()
        at = self.server.addresses
        options = dataclasses.replace(
            self.server.options, http_port=at.http_port, grpc_port=at.grpc_port, metrics_port=at.metrics_port
        )
        self.server = self._new_server(options)
        self.server.start()

    def _new_server(self, options: ServerOptions) -> Server:
        return Server(options, self._on_progress, self._on_log)
