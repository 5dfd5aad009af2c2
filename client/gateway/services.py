"""What routers share, and how they get it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from client.gateway.images import ImageReader
from client.gateway.lifecycle import Lifecycle
from client.gateway.metrics import Metrics
from client.gateway.monitor import Monitor
from client.gateway.settings import GatewaySettings
from client.gateway.triton import Triton
from client.gateway.vocabulary import Vocabulary
from python_backends.tracing import Tracing


@dataclass(frozen=True)
class Services:
    """One gateway's parts."""

    settings: GatewaySettings
    lifecycle: Lifecycle
    metrics: Metrics
    triton: Triton
    images: ImageReader
    vocabulary: Vocabulary
    monitor: Monitor
    tracing: Tracing


async def _services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


ServicesOf = Annotated[Services, Depends(_services)]
"""A router's parameter."""
