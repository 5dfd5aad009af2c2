"""What the OpenAPI document says beside the bodies: errors, and streams."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from client.gateway.errors import ErrorBody

_MEANINGS = {
    400: "A value is outside its range, or the request asks for what this server does not offer",
    401: "No API key, or one that is not valid",
    404: "No such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is compressed",
    421: "The server is for its own machine only",
    422: "The body is JSON, but not as documented",
    429: "The key's share is used up for now; see Retry-After",
    431: "Too many headers",
    499: "The client went away",
    500: "A fault of the server",
    503: "The queue is full, or the server is stopping or starting; see Retry-After",
    504: "The request's deadline or queue timeout passed",
}

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning} for status, meaning in _MEANINGS.items()
}


def streamed(event: type[BaseModel]) -> dict[str, Any]:
    """The 200 of an endpoint that streams where asked to; ``event`` is the JSON of each event's data."""
    fields = ", ".join(event.model_fields)
    text = f"With stream: server-sent events, each `data: ` and an object with {fields}; the last is `data: [DONE]`."
    return {"content": {"text/event-stream": {"schema": {"type": "string", "description": text}}}}
