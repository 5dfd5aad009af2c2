"""WiCore's own endpoints, as users of the earlier engine know them: /v1/inference and /v1/stats."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from client.answer import Answer, AnswersBuilder, Piece
from client.gateway import answering
from client.gateway.answering import Ask, EventStream
from client.gateway.json_route import JsonRoute
from client.gateway.openai import translate
from client.gateway.openai.documents import ERRORS, streamed
from client.gateway.openai.requests import Generation
from client.gateway.services import Services, ServicesOf

router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["wicore"])


class InferenceRequest(Generation):
    """POST /v1/inference."""

    prompt: str
    images: list[str] = Field(default=[], description="Base64 or data URLs, in the order of their places.")


class InferenceAnswer(BaseModel):
    """Answer of /v1/inference; streamed, the last event's data."""

    id: str
    content: str
    token_count: int
    """Tokens of the answer."""
    latency_ms: float
    gpu_utilization: float | None
    """0 to 1; null without a GPU."""
    finish_reason: str
    time_to_first_token_ms: float
    prompt_tokens: int
    cached_tokens: dict[str, int]
    """Prompt tokens taken from the KV cache, by tier."""


class InferencePiece(BaseModel):
    """An event of a streamed answer."""

    id: str
    content: str


class Percentiles(BaseModel):
    """Milliseconds, of the gateway's last 4,096; null before the first."""

    count: int
    p50: float | None
    p90: float | None
    p99: float | None


class LatencyStats(BaseModel):
    """As clients of the gateway see them."""

    time_to_first_token: Percentiles
    inter_token: Percentiles
    request: Percentiles


class QueueStats(BaseModel):
    """Requests without a slot."""

    waiting: int
    time: dict[str, Any]
    """Histogram of the decoder since its start: bounds_s, cumulative counts (one more), sum_s."""


class BatchStats(BaseModel):
    """Sequences that are decoded together."""

    slots: int
    running: int
    decoding: int
    occupancy: float
    """Running ÷ slots."""
    mean_rows: float
    """Sequences in a decode step, over the window."""
    padding_share: float


class ThroughputStats(BaseModel):
    """Over the last ten seconds, or as long as the gateway runs."""

    window_s: float
    prompt_tokens_per_s: float
    generation_tokens_per_s: float


class TierStats(BaseModel):
    """One tier of the KV cache."""

    used_bytes: int
    limit_bytes: int
    entries: int
    pressure: float


class Stats(BaseModel):
    """Answer of /v1/stats. Null: the server has no such thing."""

    uptime_s: float
    queue: QueueStats
    batch: BatchStats
    throughput: ThroughputStats
    latency_ms: LatencyStats
    tiers: dict[str, TierStats | None]
    hit_rates: dict[str, float] | None
    """Share of prompt tokens by tier, and in total, since the decoder's start."""
    gpu_utilization: float | None
    gpu_memory_used_bytes: int | None
    gpu_memory_total_bytes: int | None
    totals: dict[str, float]
    """The decoder's counts since its start."""


@router.post("/inference", response_model=InferenceAnswer, responses={**ERRORS, 200: streamed(InferencePiece)})
async def infer(body: InferenceRequest, request: Request, services: ServicesOf) -> Response:
    """Answer a prompt with pictures."""
    images = await services.images.read(body.images)
    ask = Ask(
        body.prompt, None, images, translate.options_of(body), answering.triton_id(request), answering.trace_of(request)
    )
    if body.stream:
        pieces = await answering.started(services, ask, request)
        return EventStream(_events(ask, services, pieces))
    (answer,) = await answering.unless_gone(request.receive, answering.whole(services, ask))
    return JSONResponse(_answer(answer, services))


async def _events(ask: Ask, services: Services, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[str, None]:
    builder = AnswersBuilder(ask.request_id)
    async with aclosing(pieces):
        async for piece in pieces:
            builder.add(piece, time.perf_counter() - ask.arrived_s)
            if piece.text:
                yield json.dumps({"id": ask.request_id, "content": piece.text}, ensure_ascii=False)
    (answer,) = builder.finish()
    yield json.dumps(_answer(answer, services), ensure_ascii=False)


def _answer(answer: Answer, services: Services) -> dict[str, Any]:
    return {
        "id": answer.request_id,
        "content": answer.text,
        "token_count": answer.usage.completion_tokens,
        "latency_ms": round(answer.duration_s * 1000, 3),
        "gpu_utilization": services.monitor.gpu_utilization,
        "finish_reason": answering.check_ended(answer.finish_reason),
        "time_to_first_token_ms": round(answer.ttft_s * 1000, 3),
        "prompt_tokens": answer.usage.prompt_tokens,
        "cached_tokens": answer.usage.cached_tokens,
    }


@router.get("/stats", responses=ERRORS)
async def stats(services: ServicesOf) -> Stats:
    """What the server does now."""
    return Stats.model_validate(await services.monitor.stats())
