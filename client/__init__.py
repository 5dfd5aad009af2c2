"""Talking to WiCore: the client library and the `wicore` command."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from client.answer import Answer, Piece, PromptLogprobs, TokenLogprob, ToolCall, Usage
    from client.async_client import AsyncClient
    from client.client import Client
    from client.request import ImageLike, Messages, Options
    from client.sessions import SessionState
    from python_backends.errors import WiCoreError

__all__ = [
    "Answer",
    "AsyncClient",
    "Client",
    "ImageLike",
    "Messages",
    "Options",
    "Piece",
    "PromptLogprobs",
    "SessionState",
    "TokenLogprob",
    "ToolCall",
    "Usage",
    "WiCoreError",
]
_MODULES = (
    "client.answer",
    "client.client",
    "client.async_client",
    "client.request",
    "client.sessions",
    "python_backends.errors",
)


def __getattr__(name: str) -> object:
    """Import what is asked for when it is: gRPC and NumPy take half a second, and the command begins here too."""
    if name in __all__:
        for module in _MODULES:
            if hasattr(found := importlib.import_module(module), name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
