"""What the client gives back, and how a Triton response becomes it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import InferResult, service_pb2

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
    """Tokens of one request; ``cached_tokens`` per memory tier, of the prompt."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """A part of an answer, as it arrives. The last one has a finish reason and the usage."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Of the tokens, natural logarithm."""
    finish_reason: str = ""
    """Empty until the last piece; then stop, length, tool_calls, cancelled, deadline or error."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """As OpenAI writes them."""
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
    tool_calls: tuple[dict[str, Any], ...] = ()

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
            **({"tool_calls": list(self.tool_calls)} if self.tool_calls else {}),
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
        return Answer(
            text="".join(piece.text for piece in self._pieces),
            token_ids=tuple(token for piece in self._pieces for token in piece.token_ids),
            logprobs=tuple(value for piece in self._pieces for value in piece.logprobs),
            finish_reason=last.finish_reason,
            usage=last.usage or Usage(),
            request_id=self._request_id,
            ttft_s=self._ttft_s,
            duration_s=now,
            tool_calls=tuple(call for piece in self._pieces for call in piece.tool_calls),
        )


def read_piece(response: service_pb2.ModelStreamInferResponse) -> Piece | None:
    """A response as a piece; None for Triton's empty final response.

    Raises:
        WiCoreError: the response is an error.
    """
    if response.error_message:
        raise from_triton(response.error_message)
    if not response.infer_response.outputs:
        return None
    result = InferResult(response.infer_response)
    usage = _word(result, "usage")
    reason = _word(result, "finish_reason")
    return Piece(
        text=_word(result, "text_output"),
        token_ids=tuple(result.as_numpy("token_ids").reshape(-1).tolist()),
        logprobs=tuple(result.as_numpy("token_logprobs").reshape(-1).tolist()),
        finish_reason=reason,
        tool_calls=tuple(json.loads(_word(result, "tool_calls") or "[]")),
        usage=_usage(usage) if usage else None,
        error=_incomplete(_word(result, "error_code"), reason),
    )


def _word(result: InferResult, name: str) -> str:
    """A string output of one element."""
    values: Iterable[bytes] = result.as_numpy(name).reshape(-1)
    return b"".join(values).decode(errors="replace")


def _usage(text: str) -> Usage:
    values = json.loads(text)
    return Usage(values["prompt_tokens"], values["completion_tokens"], values.get("cached_tokens", {}))


_INCOMPLETE = {
    CancelledError.code: "the answer was stopped before its end",
    DeadlineExceededError.code: "the request's time ran out before its answer was complete; allow more with "
    "deadline_ms or queue_timeout_ms, or ask for fewer tokens",
}


def _incomplete(code: str, reason: str) -> WiCoreError | None:
    """The exception for an answer that ended early."""
    if not code:
        return None
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
