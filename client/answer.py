"""What the client gives back, and how a Triton response becomes it."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc
from tritonclient.grpc import service_pb2

from python_backends.errors import (
    BY_CODE,
    CancelledError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    ServerUnavailableError,
    WiCoreError,
    from_message,
)


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: dict[str, int] = field(default_factory=dict)
    """Of the prompt: how many came from each tier of the KV cache instead of being computed."""
    cache_miss: str = ""
    """Why it was not more; empty where it was all that can be."""


class TokenLogprob(NamedTuple):
    """A token that could have stood at a place, and the natural logarithm of its probability there."""

    token_id: int
    logprob: float


TopLogprobs = tuple[TokenLogprob, ...]
"""The most likely tokens at one place, in falling order."""


@dataclass(frozen=True)
class PromptLogprobs:
    """Of each prompt token given those before it, from the second token on."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[TopLogprobs, ...]
    """Empty unless more than the prompt's own tokens were asked for."""


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called. Ask again with `Answer.message` and each call's `result` behind it."""

    id: str
    name: str
    arguments: str
    """JSON text; the model wrote it, so check it before acting on it."""

    def parsed(self) -> dict[str, Any]:
        """The arguments by name."""
        values: dict[str, Any] = json.loads(self.arguments)
        return values

    def result(self, content: str) -> dict[str, Any]:
        """What the function returned, as a message."""
        return {"role": "tool", "tool_call_id": self.id, "content": content}

    def as_dict(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Piece:
    """A part of an answer, as it arrives. The last one has a finish reason and the usage."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Of the tokens, natural logarithm."""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    """For each token; empty unless asked for."""
    index: int = 0
    """Which of the request's ``n`` answers."""
    finish_reason: str = ""
    """Empty until the last piece; then stop, length, tool_calls, cancelled, deadline or error."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Each comes whole, and its text in no piece."""
    prompt_logprobs: PromptLogprobs | None = None
    """In one piece, where asked for."""
    usage: Usage | None = None
    error: WiCoreError | None = None
    """Why the answer is not complete; raised after this piece."""


@dataclass(frozen=True)
class Answer:
    """A whole answer. Times are seconds from sending the request."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    usage: Usage
    request_id: str
    ttft_s: float
    """Until the first piece."""
    duration_s: float
    index: int = 0
    tool_calls: tuple[ToolCall, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    """For each token; empty unless asked for."""
    prompt_logprobs: PromptLogprobs | None = None
    """Where asked for; of several answers to one prompt the first has them."""

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message, to ask on with."""
        found: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            found["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        return found

    @property
    def tokens_per_s(self) -> float:
        """Decode speed: tokens after the first over the time since the first; 0 for an answer of one token."""
        seconds = self.duration_s - self.ttft_s
        return (len(self.token_ids) - 1) / seconds if len(self.token_ids) > 1 and seconds > 0 else 0.0

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": vars(self.usage),
            "request_id": self.request_id,
            "ttft_s": round(self.ttft_s, 4),
            "duration_s": round(self.duration_s, 4),
            "tokens_per_s": round(self.tokens_per_s, 2),
            "token_ids": list(self.token_ids),
            **({"tool_calls": [call.as_dict() for call in self.tool_calls]} if self.tool_calls else {}),
        }


class AnswerBuilder:
    """Joins pieces; ``now`` values are seconds from sending the request."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._pieces: list[Piece] = []
        self._ttft_s = 0.0

    def add(self, piece: Piece, now: float) -> None:
        """Take a piece that arrived ``now``."""
        if not self._pieces:
            self._ttft_s = now
        self._pieces.append(piece)

    def finish(self, now: float) -> Answer:
        """The answer; the last piece must have been added."""
        last = self._pieces[-1]
        prompts = (piece.prompt_logprobs for piece in self._pieces if piece.prompt_logprobs)
        return Answer(
            text="".join(piece.text for piece in self._pieces),
            token_ids=tuple(token for piece in self._pieces for token in piece.token_ids),
            logprobs=tuple(value for piece in self._pieces for value in piece.logprobs),
            finish_reason=last.finish_reason,
            usage=last.usage or Usage(),
            request_id=self._request_id,
            ttft_s=self._ttft_s,
            duration_s=now,
            index=last.index,
            tool_calls=tuple(call for piece in self._pieces for call in piece.tool_calls),
            top_logprobs=tuple(top for piece in self._pieces for top in piece.top_logprobs),
            prompt_logprobs=next(prompts, None),
        )


class AnswersBuilder:
    """`AnswerBuilder` for the ``n`` answers of one request, whose pieces arrive mixed."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._builders: dict[int, AnswerBuilder] = {}
        self._last_s: dict[int, float] = {}

    def add(self, piece: Piece, now: float) -> None:
        """Take a piece of any of them."""
        self._builders.setdefault(piece.index, AnswerBuilder(self._request_id)).add(piece, now)
        self._last_s[piece.index] = now

    def finish(self) -> tuple[Answer, ...]:
        """By index; every last piece must have been added."""
        return tuple(self._builders[index].finish(self._last_s[index]) for index in sorted(self._builders))


class Progress:
    """How many of a request's ``n`` answers have ended, and why one of them is not complete."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._ended: set[int] = set()
        self._error: WiCoreError | None = None

    def add(self, piece: Piece) -> None:
        """Take the next piece."""
        if piece.finish_reason:
            self._ended.add(piece.index)
            self._error = self._error or piece.error

    @property
    def complete(self) -> bool:
        """Whether nothing more will come."""
        return len(self._ended) >= self._n

    def check(self) -> None:
        """Once nothing more will come: raises the error of an answer that ended early."""
        if self.complete and self._error is not None:
            raise self._error


_SELDOM = ("usage", "prompt_token_logprobs", "top_logprobs", "tool_calls", "error_code", "finish_reason")
"""Outputs that are empty but for few pieces."""
_of_seldom = operator.itemgetter(*_SELDOM)
_EMPTY_BYTES = 4
"""Of a string output on the wire."""


def read_piece(response: service_pb2.ModelStreamInferResponse) -> Piece | None:
    """A response as a piece; None for Triton's empty final response.

    Raises:
        WiCoreError: the response is an error.
    """
    if response.error_message:
        raise from_triton(response.error_message)
    found = response.infer_response
    if not found.outputs:
        return None
    # Straight from the wire: the client library's own way to NumPy takes longer than all the rest of a piece.
    raw = {output.name: data for output, data in zip(found.outputs, found.raw_output_contents, strict=True)}
    text, index = _word(raw["text_output"]), int.from_bytes(raw["index"], "little")
    token_ids = tuple(memoryview(raw["token_ids"]).cast("i"))
    logprobs = tuple(memoryview(raw["token_logprobs"]).cast("f"))
    seldom = _of_seldom(raw)
    if max(map(len, seldom)) <= _EMPTY_BYTES:  # as nearly every piece
        return Piece(text, token_ids, logprobs, index=index)
    usage, prompt, tops, calls, error, reason = map(_word, seldom)
    return Piece(
        text=text,
        token_ids=token_ids,
        logprobs=logprobs,
        top_logprobs=_tops(json.loads(tops)) if tops else (),
        index=index,
        finish_reason=reason,
        tool_calls=_tool_calls(calls) if calls else (),
        prompt_logprobs=_prompt_logprobs(prompt) if prompt else None,
        usage=_usage(usage) if usage else None,
        error=_incomplete(error, reason) if error else None,
    )


def _word(raw: bytes) -> str:
    """A string output of one element: four bytes of length (little-endian), then as many of text."""
    return raw[4:].decode(errors="replace")


def _usage(text: str) -> Usage:
    values = json.loads(text)
    return Usage(
        values["prompt_tokens"],
        values["completion_tokens"],
        values.get("cached_tokens", {}),
        values.get("cache_miss", ""),
    )


def _tool_calls(text: str) -> tuple[ToolCall, ...]:
    entries = json.loads(text)
    return tuple(ToolCall(entry["id"], entry["function"]["name"], entry["function"]["arguments"]) for entry in entries)


def _tops(values: Sequence[Sequence[tuple[int, float]]]) -> tuple[TopLogprobs, ...]:
    return tuple(tuple(TokenLogprob(*pair) for pair in pairs) for pairs in values)


def _prompt_logprobs(text: str) -> PromptLogprobs:
    values = json.loads(text)
    return PromptLogprobs(tuple(values["token_ids"]), tuple(values["logprobs"]), _tops(values["top"]))


_INCOMPLETE = {
    CancelledError.code: "the answer was stopped before its end",
    DeadlineExceededError.code: "the request's time ran out before its answer was complete; allow more with "
    "deadline_ms or queue_timeout_ms, or ask for fewer tokens",
}


def _incomplete(code: str, reason: str) -> WiCoreError:
    """The exception for an answer that ended early."""
    text = _INCOMPLETE.get(code, f"the server ended the answer early ({reason}); its log has the details")
    return BY_CODE.get(code, InternalError)(text)


_BROKEN = ("is not healthy", "Stub process", "is not ready", "unavailable", "Timeout exceeded", "is stopped")


def from_triton(text: str) -> WiCoreError:
    """Triton's error message as an exception of ours, whoever wrote it."""
    ours = from_message(text)
    if ours is not None:
        return ours
    if any(words in text for words in _BROKEN):
        return ServerUnavailableError(f"the server cannot answer any more ({text}); restart it")
    return InvalidRequestError(text) if "unexpected" in text or "expected" in text else InternalError(text)


def from_rpc(error: grpc.RpcError, address: str) -> WiCoreError:
    """A gRPC failure as an exception of ours."""
    code, details = error.code(), error.details() or ""
    if code == grpc.StatusCode.UNAVAILABLE:
        return ServerUnavailableError(f"no server answers at {address}; start one with `wicore serve` ({details})")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError("no complete answer within the timeout; allow more, or ask for fewer tokens")
    if code == grpc.StatusCode.CANCELLED:
        return CancelledError("the request was cancelled")
    if code == grpc.StatusCode.NOT_FOUND or "unknown model" in details:
        return ServerUnavailableError(f"{address} is a Triton server without WiCore's models ({details})")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return InvalidRequestError(f"the request is too large for gRPC ({details})")
    return from_triton(details)
