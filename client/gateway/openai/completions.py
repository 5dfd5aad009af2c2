"""POST /v1/completions: texts instead of conversations."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from client.answer import Answer, Piece, Usage
from client.gateway import answering
from client.gateway.answering import Ask, EventStream
from client.gateway.json_route import JsonRoute
from client.gateway.openai import translate
from client.gateway.openai.documents import ERRORS, streamed
from client.gateway.openai.requests import CompletionRequest
from client.gateway.openai.responses import TextCompletion
from client.gateway.services import Services, ServicesOf
from python_backends.errors import UnsupportedFeatureError

router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["openai"])


@router.post("/completions", response_model=TextCompletion, responses={**ERRORS, 200: streamed(TextCompletion)})
async def create_completion(body: CompletionRequest, request: Request, services: ServicesOf) -> Response:
    """Answer one or several prompts; a streamed request has one."""
    asks = await translate.ask_completions(body, request, services)
    head = {
        "id": f"cmpl-{asks[0].request_id}",
        "object": "text_completion",
        "created": translate.created(),
        "model": services.settings.model,
    }
    if body.stream:
        if len(asks) > 1:
            raise UnsupportedFeatureError("a streamed request has one prompt; send several requests")
        pieces = await answering.started(services, asks[0], request)
        return EventStream(_events(body, services, head, pieces))
    found = await answering.unless_gone(request.receive, _together(services, asks))
    flat = [answer for answers in found for answer in answers]
    choices = [_choice(place, answer, body, services) for place, answer in enumerate(flat)]
    usage = translate.add_usages([translate.usage_body([answer.usage for answer in answers]) for answers in found])
    return JSONResponse({**head, "choices": choices, "usage": usage})


async def _together(services: Services, asks: Sequence[Ask]) -> list[tuple[Answer, ...]]:
    """All at once; where one fails the others are stopped."""
    tasks = [asyncio.ensure_future(answering.whole(services, ask)) for ask in asks]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _choice(place: int, answer: Answer, body: CompletionRequest, services: Services) -> dict[str, Any]:
    logprobs = None
    if body.logprobs is not None:
        tops = answer.top_logprobs if body.logprobs else ()
        logprobs = translate.text_logprobs(services.vocabulary, answer.token_ids, answer.logprobs, tops)
    reason = answering.check_ended(answer.finish_reason)
    return {"index": place, "text": answer.text, "logprobs": logprobs, "finish_reason": reason}


async def _events(
    body: CompletionRequest, services: Services, head: dict[str, Any], pieces: AsyncGenerator[Piece, None]
) -> AsyncGenerator[str, None]:
    usages: list[Usage] = []
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    lengths: dict[int, int] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            if piece.usage:
                usages.append(piece.usage)
            if piece.error is not None:
                continue
            logprobs = None
            offset = lengths.get(piece.index, 0)
            if body.logprobs is not None and piece.token_ids:
                tops = piece.top_logprobs if body.logprobs else ()
                logprobs = translate.text_logprobs(services.vocabulary, piece.token_ids, piece.logprobs, tops, offset)
            lengths[piece.index] = offset + len(piece.text)
            reason = answering.check_ended(piece.finish_reason) if piece.finish_reason else None
            choice = {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": reason}
            yield _chunk(head, [choice], wants_usage=wants_usage)
    if wants_usage:
        yield _chunk(head, [], wants_usage=True, usage=translate.usage_body(usages))


def _chunk(
    head: dict[str, Any], choices: list[dict[str, Any]], *, wants_usage: bool, usage: dict[str, Any] | None = None
) -> str:
    chunk = {**head, "choices": choices, **({"usage": usage} if wants_usage else {})}
    return json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
