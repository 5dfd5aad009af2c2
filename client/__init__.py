"""Talking to WiCore: the client library and the `wicore` command."""

from client.answer import Answer, Piece, PromptLogprobs, TokenLogprob, ToolCall, Usage
from client.client import AsyncClient, Client
from client.request import ImageLike, Messages, Options
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
    "TokenLogprob",
    "ToolCall",
    "Usage",
    "WiCoreError",
]
