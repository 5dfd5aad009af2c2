"""What a session's KV can be asked for, as a request to the decoder and its answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tritonclient.grpc import service_pb2

from client.answer import Piece
from client.request import infer_request
from python_backends import contract
from python_backends.errors import ServerUnavailableError

SessionAction = Literal["show", "pin", "unpin", "save", "restore", "prefetch", "erase"]
"""``pin`` keeps it, also what its later requests leave, on disk too, until ``unpin``; ``save`` copies it to disk and
``restore`` into memory, and both wait for it; ``prefetch`` only begins that."""


@dataclass(frozen=True)
class SessionState:
    """What the KV cache holds of a session; for ``erase``, what it held."""

    tokens: int
    """That a prompt which continues it need not compute."""
    bytes: dict[str, int]
    """By tier; a copy counts on each."""
    pinned: bool


def session_request(name: str, action: str, cache_salt: str, request_id: str) -> service_pb2.ModelInferRequest:
    """A request to the decoder."""
    values = {"command": f"session.{action}", "session": name, "cache_salt": cache_salt or None}
    return infer_request(contract.MODELS[contract.DECODER], values, f"{request_id}-session")


def session_state(pieces: Iterable[Piece | None]) -> SessionState:
    """The answer to it. Raises ServerUnavailableError where there is none."""
    for piece in pieces:
        if piece is not None:
            return SessionState(**json.loads(piece.text))
    raise ServerUnavailableError("the server did not answer about the session; see its log")
