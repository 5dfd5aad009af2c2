"""Requests as the client library asks them, and answers as OpenAI's API writes them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from client.answer import Piece, TopLogprobs, Usage
from client.gateway.answering import Ask, trace_of, triton_id
from client.gateway.openai.requests import ChatRequest, CompletionRequest, Generation, Message
from client.gateway.services import Services
from client.gateway.vocabulary import Vocabulary
from python_backends import contract
from python_backends.errors import InvalidParameterError, UnknownModelError, UnsupportedFeatureError

NO_LOGPROB = -9999.0
"""What OpenAI writes for minus infinity, which JSON does not have."""
_SAME = (
    "n",
    "max_tokens",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "response_format",
    "min_tokens",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "ignore_eos",
    "priority",
    "queue_timeout_ms",
    "deadline_ms",
    "session",
    "cache_salt",
)
"""Parameters that have one name everywhere."""


def check_model(name: str | None, services: Services) -> None:
    """Raises UnknownModelError for a model that is not served here; none at all is the one there is."""
    served = services.settings.model
    if name not in (None, "", served, contract.ENSEMBLE):
        raise UnknownModelError(f"there is no model {name!r} here; use {served!r}")


def options_of(body: Generation) -> dict[str, Any]:
    """What is given, by the client library's names."""
    options = {name: value for name in _SAME if (value := getattr(body, name, None)) is not None}
    if body.seed is not None:
        options["seed"] = body.seed % 2**64  # OpenAI's may be negative
    return options


async def ask_chat(body: ChatRequest, request: Request, services: Services) -> Ask:
    """One conversation.

    Raises:
        InvalidRequestError: and its subclasses, for what can be seen to be wrong here.
    """
    check_model(body.model, services)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidParameterError("top_logprobs needs logprobs: true")
    options = options_of(body)
    if body.max_completion_tokens is not None:
        options["max_tokens"] = body.max_completion_tokens
    if body.top_logprobs:
        options["logprobs"] = body.top_logprobs
    if body.tools:
        options["tools"] = body.tools
    if body.tool_choice is not None:
        options["tool_choice"] = body.tool_choice
    if body.logprobs:
        await _load(services.vocabulary)
    messages, sources = _messages(body.messages)
    images = await services.images.read(sources)
    return Ask(None, messages, images, options, triton_id(request), trace_of(request))


async def ask_completions(body: CompletionRequest, request: Request, services: Services) -> list[Ask]:
    """One for each prompt.

    Raises:
        InvalidRequestError: as `ask_chat`.
    """
    check_model(body.model, services)
    if body.best_of not in (None, body.n or 1):
        raise UnsupportedFeatureError("best_of is not offered apart from n; leave it out")
    if body.echo and body.logprobs is not None:
        raise UnsupportedFeatureError("echo together with logprobs is not offered; leave one of them out")
    options = options_of(body)
    if body.echo:
        options["echo"] = True
    if body.logprobs is not None:
        await _load(services.vocabulary)
        options["logprobs"] = body.logprobs
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    return [Ask(prompt, None, (), options, triton_id(request), trace_of(request)) for prompt in prompts]


async def _load(vocabulary: Vocabulary) -> None:
    import asyncio

    await asyncio.to_thread(vocabulary.load)


def _messages(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages with a placeholder for each picture, and the pictures in their order."""
    found, sources = [], []
    for message in messages:
        values = message.model_dump(exclude_none=True)
        content = values.get("content")
        if isinstance(content, list):
            for place, part in enumerate(content):
                if part["type"] == "text":
                    continue
                source = part.get("image_url", part.get("image"))
                sources.append(source["url"] if isinstance(source, dict) else source)
                content[place] = {"type": "image"}
        elif content is None:
            values["content"] = None
        found.append(values)
    return found, sources


def created() -> int:
    """Now, in seconds since 1970."""
    return int(time.time())


def usage_body(usages: Sequence[Usage]) -> dict[str, Any]:
    """Of the answers to one prompt: the prompt counts once."""
    prompt = usages[0].prompt_tokens if usages else 0
    cached = usages[0].cached_tokens if usages else {}
    answered = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answered,
        "total_tokens": prompt + answered,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values()), "cached_tokens_by_tier": dict(cached)},
    }


def add_usages(bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of several prompts together."""
    tiers: dict[str, int] = {}
    for each in bodies:
        for tier, tokens in each["prompt_tokens_details"]["cached_tokens_by_tier"].items():
            tiers[tier] = tiers.get(tier, 0) + tokens
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {
        **{name: sum(each[name] for each in bodies) for name in names},
        "prompt_tokens_details": {"cached_tokens": sum(tiers.values()), "cached_tokens_by_tier": tiers},
    }


def chat_logprobs(
    vocabulary: Vocabulary, token_ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopLogprobs]
) -> dict[str, Any]:
    """OpenAI's ``logprobs`` of a chat choice."""
    content = []
    for place, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
        top = [_token(vocabulary, *each) for each in tops[place]] if tops else []
        content.append({**_token(vocabulary, token_id, logprob), "top_logprobs": top})
    return {"content": content}


def text_logprobs(
    vocabulary: Vocabulary,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    tops: Sequence[TopLogprobs],
    offset: int = 0,
) -> dict[str, Any]:
    """The older form, of a text choice; ``offset`` is the length of the text before."""
    tokens = [vocabulary.token(token_id)[0] for token_id in token_ids]
    offsets = [offset]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(value) for value in logprobs],
        "top_logprobs": [{vocabulary.token(each)[0]: _finite(value) for each, value in top} for top in tops],
        "text_offset": offsets[:-1],
    }


def calls_of(piece: Piece, given: int, *, parallel: bool) -> list[dict[str, Any]]:
    """OpenAI's tool calls of a piece, numbered on from ``given``; without ``parallel`` only the first of all."""
    calls = [{"index": given + place, **call.as_dict()} for place, call in enumerate(piece.tool_calls)]
    return calls if parallel else calls[: max(0, 1 - given)]


def _token(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, Any]:
    text, data = vocabulary.token(token_id)
    return {"token": text, "logprob": _finite(logprob), "bytes": data}


def _finite(value: float) -> float:
    return max(value, NO_LOGPROB)  # a number even for NaN, since comparisons with it are false
