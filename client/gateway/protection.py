"""Who may ask, and how much: before a body is read."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from client.gateway import errors
from client.gateway.keys import ApiKey, KeyRing
from client.gateway.limits import Limits
from client.gateway.settings import GatewaySettings
from python_backends.errors import AuthenticationError, RateLimitedError


class Protection:
    """Asks for a key where keys are needed, and keeps each to its limits; health and pages are for everybody."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._config = settings.config
        self._keys = KeyRing(settings.keys_path)
        self._limits = Limits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not scope["path"].startswith(("/v1/", "/metrics")):
            await self._app(scope, receive, send)
            return
        try:
            key = self._key(scope)
        except AuthenticationError as error:
            await errors.response(error)(scope, receive, send)
            return
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        concurrent = (key and key.max_concurrent_requests) or self._config.max_concurrent_requests
        per_minute = (key and key.max_requests_per_minute) or self._config.max_requests_per_minute
        try:
            with self._limits.request(key.name if key else "", concurrent, per_minute, time.monotonic()):
                await self._app(scope, receive, send)
        except RateLimitedError as error:  # from the limits; the application answers its own errors
            await errors.response(error)(scope, receive, send)

    def _key(self, scope: Scope) -> ApiKey | None:
        if not self._keys.needed:
            return None
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
        scheme, _, text = given.partition(" ")
        if scheme.lower() != "bearer" or not text:
            raise AuthenticationError("this server needs an API key; send it as: Authorization: Bearer KEY")
        return self._keys.check(text.strip())
