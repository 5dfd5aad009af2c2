"""What is kept of a conversation by name: /v1/sessions/{name}, for who may use the server at all.

The salt goes in a header, not in the address: addresses end up in logs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Header, Path
from pydantic import BaseModel, ConfigDict

from client.gateway.json_route import JsonRoute
from client.gateway.openai.documents import ERRORS
from client.gateway.services import Services, ServicesOf
from client.sessions import SessionAction

router = APIRouter(prefix="/v1/sessions", route_class=JsonRoute, tags=["wicore"])

LONGEST_NAME = 1024
Name = Annotated[str, Path(description="The `session` that requests named.", min_length=1, max_length=LONGEST_NAME)]
Salt = Annotated[
    str, Header(alias="wicore-cache-salt", description="The `cache_salt` of its requests.", max_length=LONGEST_NAME)
]
_RESPONSES = {**ERRORS, 404: {**ERRORS[404], "description": "Nothing is kept of such a session"}}


class SessionBody(BaseModel):
    """What the KV cache holds of a session; for an erased one, what it held."""

    session: str
    tokens: int
    """That a prompt which continues it need not compute."""
    bytes: dict[str, int]
    """By tier; a copy counts on each."""
    pinned: bool


class SessionCommand(BaseModel):
    """POST /v1/sessions/{name}."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["pin", "unpin", "save", "restore", "prefetch"]


@router.get("/{name:path}", responses=_RESPONSES)
async def show_session(name: Name, services: ServicesOf, salt: Salt = "") -> SessionBody:
    """What is held of it, and where."""
    return await _carry_out(services, name, "show", salt)


@router.post("/{name:path}", responses=_RESPONSES)
async def command_session(name: Name, body: SessionCommand, services: ServicesOf, salt: Salt = "") -> SessionBody:
    """Keep it until it is unpinned, copy it to disk or bring it into memory."""
    return await _carry_out(services, name, body.action, salt)


@router.delete("/{name:path}", responses=_RESPONSES)
async def erase_session(name: Name, services: ServicesOf, salt: Salt = "") -> SessionBody:
    """Forget it, on disk as well."""
    return await _carry_out(services, name, "erase", salt)


async def _carry_out(services: Services, name: str, action: SessionAction, salt: str) -> SessionBody:
    found = await services.triton.client.session(name, action, cache_salt=salt)
    return SessionBody(session=name, tokens=found.tokens, bytes=found.bytes, pinned=found.pinned)
