"""Whether the gateway lives, and whether every stage behind it does its work."""

from __future__ import annotations

import contextlib
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from client.gateway.services import ServicesOf
from python_backends.errors import WiCoreError

router = APIRouter(tags=["operations"])


class Live(BaseModel):
    """The gateway's process answers."""

    status: Literal["live"] = "live"


class Ready(BaseModel):
    """What each stage says; empty where it answers."""

    status: Literal["ready", "not_ready", "draining"]
    stages: dict[str, str]


@router.get("/health/live")
async def live() -> Live:
    """Whether the gateway's process answers."""
    return Live()


@router.get("/health/ready", response_model=Ready, responses={503: {"model": Ready}})
async def ready(services: ServicesOf) -> Response:
    """Whether requests will be answered: every stage has just done a little work; 503 where one did not."""
    if services.lifecycle.draining:
        found = Ready(status="draining", stages={})
    else:
        stages = await services.triton.stages()
        found = Ready(status="not_ready" if any(stages.values()) else "ready", stages=dict(stages))
    return JSONResponse(found.model_dump(), 200 if found.status == "ready" else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(services: ServicesOf) -> Response:
    """Prometheus metrics: the gateway's, and the decoder's as it last told them."""
    with contextlib.suppress(WiCoreError):
        await services.monitor.refresh()
    return Response(services.metrics.text(), media_type="text/plain; version=0.0.4")
