"""POST /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from json.encoder import encode_basestring
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from client.answer import Answer, Piece, Usage
from client.gateway import answering
from client.gateway.answering import EventStream
from client.gateway.json_route import JsonRoute
from client.gateway.openai import translate
from client.gateway.openai.documents import ERRORS, streamed
from client.gateway.openai.requests import ChatRequest
from client.gateway.openai.responses import ChatChunk, ChatCompletion
from client.gateway.services import Services, ServicesOf

router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["openai"])


@router.post("/chat/completions", response_model=ChatCompletion, responses={**ERRORS, 200: streamed(ChatChunk)})
async def create_chat_completion(body: ChatRequest, request: Request, services: ServicesOf) -> Response:
    """Answer a conversation with texts, pictures and tools."""
    ask = await translate.ask_chat(body, request, services)
    if body.stream:
        pieces = await answering.started(services, ask, request)
        return EventStream(_Chunks(body, services, ask.request_id).events(pieces))
    answers = await answering.unless_gone(request.receive, answering.whole(services, ask))
    found = {
        "id": f"chatcmpl-{ask.request_id}",
        "object": "chat.completion",
        "created": translate.created(),
        "model": services.settings.model,
        "choices": [_choice(answer, body, services) for answer in answers],
        "usage": translate.usage_body([answer.usage for answer in answers]),
    }
    return JSONResponse(found)


def _choice(answer: Answer, body: ChatRequest, services: Services) -> dict[str, Any]:
    calls = [call.as_dict() for call in answer.tool_calls]
    if body.parallel_tool_calls is False:
        calls = calls[:1]
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if calls:
        message |= {"tool_calls": calls, "content": answer.text or None}
    logprobs = None
    if body.logprobs:
        logprobs = translate.chat_logprobs(
            services.vocabulary, answer.token_ids, answer.logprobs, answer.top_logprobs if body.top_logprobs else ()
        )
    return {
        "index": answer.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": answering.check_ended(answer.finish_reason),
    }


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class _Chunks:
    """Pieces as events."""

    def __init__(self, body: ChatRequest, services: Services, request_id: str) -> None:
        self._body = body
        self._vocabulary = services.vocabulary
        self._head = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk",
            "created": translate.created(),
            "model": services.settings.model,
        }
        self._wants_usage = body.stream_options is not None and body.stream_options.include_usage
        self._plain_head = _json({**self._head, "choices": []})[:-2] + '{"index":'
        self._tail = ',"usage":null}' if self._wants_usage else "}"
        self._begun: set[int] = set()
        self._calls: dict[int, int] = {}

    async def events(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[str, None]:
        """The role, what is new, how each answer ended, and where asked for the usage of all."""
        usages: list[Usage] = []
        async with aclosing(pieces):
            async for piece in pieces:
                if piece.error is None:
                    yield self._plain(piece) or self._chunk([self._choice(piece)])
                if piece.usage:
                    usages.append(piece.usage)
        if self._wants_usage:
            yield self._chunk([], translate.usage_body(usages))

    def _plain(self, piece: Piece) -> str:
        """What `_chunk` would write, for the piece that nearly every token is, text alone; empty for any other."""
        rest = piece.finish_reason or piece.tool_calls or self._body.logprobs or not piece.text
        if rest or piece.index not in self._begun:
            return ""
        text = encode_basestring(piece.text)
        choice = f'{piece.index},"delta":{{"content":{text}}},"logprobs":null,"finish_reason":null}}'
        return f"{self._plain_head}{choice}]{self._tail}"

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        chunk: dict[str, Any] = {**self._head, "choices": choices}
        if self._wants_usage:
            chunk["usage"] = usage
        return _json(chunk)

    def _choice(self, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            delta["role"] = "assistant"
        if piece.text or "role" in delta:
            delta["content"] = piece.text
        given = self._calls.get(piece.index, 0)
        calls = translate.calls_of(piece, given, parallel=self._body.parallel_tool_calls is not False)
        if calls:
            self._calls[piece.index] = given + len(calls)
            delta["tool_calls"] = calls
        logprobs = None
        if self._body.logprobs and piece.token_ids:
            tops = piece.top_logprobs if self._body.top_logprobs else ()
            logprobs = translate.chat_logprobs(self._vocabulary, piece.token_ids, piece.logprobs, tops)
        reason = answering.check_ended(piece.finish_reason) if piece.finish_reason else None
        return {"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
