"""Bodies parsed without holding up other requests."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

LARGE_BODY = 256 * 2**10
"""From so many bytes on, a body is parsed on a thread, so that other requests' tokens do not wait for it."""


class JsonRequest(Request):
    """A request whose large bodies do not hold up the event loop."""

    async def json(self) -> Any:
        """The body, parsed."""
        body = await self.body()
        if len(body) < LARGE_BODY:
            return json.loads(body)
        return await asyncio.to_thread(json.loads, body)


class JsonRoute(APIRoute):
    """A route that reads its body through `JsonRequest`."""

    def get_route_handler(self) -> Any:
        """The framework's handler on a `JsonRequest`."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle
