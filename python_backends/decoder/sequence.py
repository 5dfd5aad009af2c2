"""What a request asks for, and a request on its way to being answered."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from python_backends.config import Config
from python_backends.decoder.detokenizer import Detokenizer, StopStrings
from python_backends.errors import ContextLengthError, ImageCountError, InvalidParameterError, WiCoreError
from python_backends.runtime.base import DecoderSpec, Float32

MAX_TEMPERATURE = 100.0
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024


@dataclass(frozen=True)
class Parameters:
    """How the answer is drawn and when it ends. Times are milliseconds.

    Raises:
        InvalidParameterError: a value outside its range; the message names it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    echo: bool = False
    queue_timeout_ms: int = 60_000
    deadline_ms: int = 600_000

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 1, math.inf)
        _within("temperature", self.temperature, 0, MAX_TEMPERATURE)
        _within("top_k", self.top_k, -1, math.inf)
        _within("top_p", self.top_p, 0, 1)
        _within("min_p", self.min_p, 0, 1)
        _within("queue_timeout_ms", self.queue_timeout_ms, 1, math.inf)
        _within("deadline_ms", self.deadline_ms, 1, math.inf)
        if len(self.stop) > MAX_STOPS:
            raise InvalidParameterError(f"{len(self.stop)} stop strings; at most {MAX_STOPS} are allowed")
        for stop in self.stop:
            if not 1 <= len(stop) <= MAX_STOP_LENGTH:
                raise InvalidParameterError(f"a stop string has 1 to {MAX_STOP_LENGTH} characters, not {len(stop)}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also false for NaN
        bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise InvalidParameterError(f"{name} is {value:g}; it must be {bound}")


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int

    def as_json(self) -> dict[str, object]:
        """The ``usage`` output; cached tokens per tier stay zero until the KV tiers serve them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "cached_tokens": {"device": 0, "host": 0, "nvme": 0},
        }


@dataclass(frozen=True)
class Piece:
    """A part of an answer. The last one has a finish reason (stop, length, cancelled, deadline, error) and usage."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str = ""
    usage: Usage | None = None
    error: WiCoreError | None = None


@dataclass
class Request:
    """A prompt and where its answer goes.

    ``sink`` is called from the engine's thread, in order, the last time with a finish reason. ``is_cancelled`` is asked
    between steps.
    """

    input_ids: Sequence[int]
    parameters: Parameters
    sink: Callable[[Piece], None]
    image_starts: Sequence[int] = ()
    image_features: Float32 | None = None
    """[images × tokens per image, D]"""
    request_id: str = ""
    is_cancelled: Callable[[], bool] = lambda: False

    def check(self, spec: DecoderSpec) -> None:
        """Refuse what the model cannot answer.

        Raises:
            ContextLengthError: no room for a single answer token.
            ImageCountError: placeholders and embeddings differ in number.
            InvalidParameterError: ids outside the vocabulary.
        """
        length = len(self.input_ids)
        if not 1 <= length < spec.max_context_length:
            raise ContextLengthError(
                f"the prompt has {length} tokens; this server takes 1 to {spec.max_context_length - 1}, "
                "so that one is left for the answer"
            )
        ids = (*self.input_ids, *self.parameters.stop_token_ids)
        if min(ids) < 0 or max(ids) >= spec.vocab_size:
            raise InvalidParameterError(f"token ids must lie in 0 … {spec.vocab_size - 1}")
        placeholders = sum(1 for token in self.input_ids if token == spec.image_token_id)
        given = 0 if self.image_features is None else len(self.image_features)
        if placeholders != given or len(self.image_starts) * spec.tokens_per_image != given:
            raise ImageCountError(f"the prompt has {placeholders} image tokens for {given} image embeddings")


@dataclass
class ActiveSequence:
    """A request in the engine: filled by `Engine.submit`, grown by `Engine._postprocess`, in no other place."""

    sequence_id: int
    request: Request
    detokenizer: Detokenizer
    stops: StopStrings
    max_tokens: int
    queue_deadline_s: float
    deadline_s: float
    tokens: list[int]
    """Prompt and answer so far."""
    seed: int = field(default=0)

    def __post_init__(self) -> None:
        chosen = self.request.parameters.seed
        self.seed = secrets.randbits(64) if chosen is None else chosen

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.input_ids)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self.prompt_length, len(self.tokens) - self.prompt_length)


def parameters_within(config: Config, **values: object) -> Parameters:
    """Parameters with the server's defaults for what a request leaves out (None).

    Raises:
        InvalidParameterError: a value outside its range.
    """
    chosen: dict[str, object] = {
        "max_tokens": config.max_tokens,
        "queue_timeout_ms": config.queue_timeout_ms,
        "deadline_ms": config.deadline_ms,
    }
    chosen.update({name: value for name, value in values.items() if value is not None})
    return Parameters(**chosen)  # type: ignore[arg-type]
