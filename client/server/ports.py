"""Ports, checked before tritonserver tries them, so that the message can name the option."""

from __future__ import annotations

import contextlib
import errno
import socket

import psutil

from client.server.options import Addresses, ServerOptions
from python_backends.errors import ServerStartError

MAX_PORT = 65535


def choose(options: ServerOptions) -> Addresses:
    """The ports to listen on; each 0 becomes a free one.

    Raises:
        ServerStartError: a port is taken, not allowed, out of range or named twice, or the host is not this machine.
    """
    wanted = {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port}
    named = [port for port in wanted.values() if port]
    for service, port in wanted.items():
        if not 0 <= port <= MAX_PORT:
            raise ServerStartError(f"--{service}-port {port} is not a port: it must be 0 (a free one) to {MAX_PORT}")
        if port and named.count(port) > 1:
            raise ServerStartError(f"--{service}-port {port} is asked for twice; give each service its own port")
    with contextlib.ExitStack() as held:  # all at once, so that no free port is found twice
        hosts = {"metrics": options.metrics_host or options.host}
        found = {name: _bind(held, hosts.get(name, options.host), port, name) for name, port in wanted.items()}
    return Addresses(options.host, found["http"], found["grpc"], found["metrics"])


def _bind(held: contextlib.ExitStack, host: str, port: int, service: str) -> int:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ServerStartError(f"--host {host} is not an address of this machine: {error}") from error
    listener = held.enter_context(socket.socket(family, kind))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1)
    except OSError as error:
        raise ServerStartError(_reason(error, host, port, service)) from error
    return int(listener.getsockname()[1])


def _reason(error: OSError, host: str, port: int, service: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host}, for {service}, is taken{_owner(port)}; stop that program, or choose another port "
            f"with --{service}-port PORT (0 picks a free one)"
        )
    if error.errno == errno.EACCES:
        return f"port {port}, for {service}, needs privileges; choose one above 1023 with --{service}-port PORT"
    return f"cannot listen on {host}: {error.strerror}; name an address of this machine with --host"


def _owner(port: int) -> str:
    """ " by NAME (process ID)" where this user may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    except psutil.Error:
        pass
    return ""
