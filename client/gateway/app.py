"""The ASGI application: routers over one `Triton`, behind the middleware that protects it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from client.gateway import errors, health, native, sessions
from client.gateway.decoder_metrics import DecoderCollector
from client.gateway.gpu import GpuMeter
from client.gateway.images import ImageReader
from client.gateway.lifecycle import Lifecycle
from client.gateway.metrics import Metrics
from client.gateway.middleware import BodyReader, Draining, Outermost
from client.gateway.monitor import Monitor
from client.gateway.openai import chat, completions, models
from client.gateway.protection import Protection
from client.gateway.services import Services
from client.gateway.settings import GatewaySettings
from client.gateway.triton import Triton
from client.gateway.vocabulary import Vocabulary
from python_backends.errors import WiCoreError
from python_backends.tracing import Tracing

WEB = Path(__file__).parent / "web"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The last two: no script can turn a text into HTML or code, so no answer of a model can (Trusted Types)."""

_PAGE_HEADERS = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"cache-control", b"no-cache"),  # asked for anew each time (304 mostly), so that no page is a mix of two versions
)


class Pages(StaticFiles):
    """Static files that may load nothing from elsewhere; they get what no route takes."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one file."""
        if scope["type"] == "http" and (scope["method"] not in ("GET", "HEAD") or scope["path"].startswith("/v1/")):
            raise HTTPException(404, f"there is no {scope['method']} {scope['path']}; see /openapi.json")

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += _PAGE_HEADERS
            await send(message)

        await super().__call__(scope, receive, with_policy)


def create_app(settings: GatewaySettings, lifecycle: Lifecycle | None = None) -> FastAPI:
    """The application. It connects when it starts and closes its connections when it ends."""
    lifecycle = lifecycle or Lifecycle()
    metrics = Metrics()
    tracing = Tracing("gateway", settings.config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        triton = Triton(settings.triton, settings.answer_timeout_s)
        monitor = Monitor(triton, GpuMeter())
        app.state.services = Services(
            settings,
            lifecycle,
            metrics,
            triton,
            ImageReader(settings),
            Vocabulary(settings.repository),
            monitor,
            tracing,
        )
        metrics.registry.register(DecoderCollector(monitor))
        monitor.start()
        triton.line.start()
        try:
            yield
        finally:
            await monitor.close()
            await triton.close()
            tracing.close()

    app = FastAPI(
        title="WiCore",
        summary="Gemma-3 (text and images) served from NVIDIA Triton.",
        version="1",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers={
            WiCoreError: errors.on_wicore_error,
            HTTPException: errors.on_http_exception,
            RequestValidationError: errors.on_validation_error,
        },
        middleware=[
            Middleware(Outermost, settings=settings, metrics=metrics, tracing=tracing),
            Middleware(GZipMiddleware, minimum_size=1024, compresslevel=5),
            Middleware(Draining, lifecycle=lifecycle),
            Middleware(Protection, settings=settings),
            Middleware(BodyReader, settings=settings),
        ],
    )
    # For the document alone: `Protection` asks for the key before anything is read.
    bearer = Depends(HTTPBearer(auto_error=False, description="Needed where the operator has made API keys."))
    for router in routers():
        app.include_router(router, dependencies=[] if router is health.router else [bearer])
    app.router.default = Pages(directory=WEB, html=True)
    return app


def routers() -> list[APIRouter]:
    """Every endpoint."""
    return [health.router, chat.router, completions.router, models.router, native.router, sessions.router]
