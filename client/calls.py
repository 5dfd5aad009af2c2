"""What calls of both clients have in common: names, times, channel options, what is refused before they are made."""

from __future__ import annotations

import operator
import secrets

from client.request import Options
from python_backends.errors import InvalidParameterError, ServerUnavailableError

TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 2.0
"""How long a stop may take."""
SESSION_TIMEOUT_S = 90.0
"""How long copying a session may take."""
STOPPED = "stop"
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # two minutes otherwise, long after a server is back
)


def new_request_id() -> str:
    """A name for a request that no other has."""
    return secrets.token_hex(12)


def count_of(options: Options) -> int:
    """How many answers were asked for; what is no number is refused when the request is made."""
    try:
        return operator.index(options.get("n", 1))
    except TypeError:
        return 1


def refuse_several(options: Options) -> None:
    """Raise InvalidParameterError where more than one answer was asked for."""
    if count_of(options) > 1:
        raise InvalidParameterError(
            f"n is {count_of(options)} and generate gives one answer; use generate_n, or stream"
        )


def truncated() -> ServerUnavailableError:
    """What to raise where a stream ended before its answer."""
    return ServerUnavailableError("the server ended the stream before the answer was complete; see its log")
