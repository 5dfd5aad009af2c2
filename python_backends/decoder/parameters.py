"""How an answer is drawn and when it ends: one frozen value per request, checked when it is made."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from python_backends.config import Config
from python_backends.decoder.adjustments import Penalties
from python_backends.errors import InvalidParameterError

MAX_TEMPERATURE = 100.0
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_TOP_LOGPROBS = 20
MAX_ANSWERS = 64
MAX_BIASES = 1024
PENALTY_RANGE = 2.0
BIAS_RANGE = 100.0


@dataclass(frozen=True)
class Parameters:
    """Times are milliseconds.

    Raises:
        InvalidParameterError: a value outside its range; the message names it.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 and −1 are off."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    echo: bool = False
    logprobs: int | None = None
    """Most likely tokens to report beside each drawn one; None reports the drawn ones alone."""
    prompt_logprobs: int | None = None
    """As ``logprobs`` for the prompt's tokens; None reports nothing of the prompt."""
    priority: int = 0
    """Lower is sooner."""
    queue_timeout_ms: int = 60_000
    deadline_ms: int = 600_000

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 1, math.inf)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        _within("temperature", self.temperature, 0, MAX_TEMPERATURE)
        _within("top_k", self.top_k, -1, math.inf)
        _within("top_p", self.top_p, 0, 1)
        _within("min_p", self.min_p, 0, 1)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _within("presence_penalty", self.presence_penalty, -PENALTY_RANGE, PENALTY_RANGE)
        _within("frequency_penalty", self.frequency_penalty, -PENALTY_RANGE, PENALTY_RANGE)
        _within("n", self.n, 1, MAX_ANSWERS)
        for name in ("logprobs", "prompt_logprobs"):
            _within(name, getattr(self, name) or 0, 0, MAX_TOP_LOGPROBS)
        _within("priority", self.priority, -1000, 1000)
        _within("queue_timeout_ms", self.queue_timeout_ms, 1, math.inf)
        _within("deadline_ms", self.deadline_ms, 1, math.inf)
        self._check_lists()

    def _check_lists(self) -> None:
        if len(self.stop) > MAX_STOPS:
            raise InvalidParameterError(f"{len(self.stop)} stop strings; at most {MAX_STOPS} are allowed")
        for stop in self.stop:
            if not 1 <= len(stop) <= MAX_STOP_LENGTH:
                raise InvalidParameterError(f"a stop string has 1 to {MAX_STOP_LENGTH} characters, not {len(stop)}")
        if len(self.logit_bias) > MAX_BIASES:
            raise InvalidParameterError(f"logit_bias names {len(self.logit_bias)} tokens; at most {MAX_BIASES} may be")
        for token, value in self.logit_bias:
            _within(f"logit_bias of token {token}", value, -BIAS_RANGE, BIAS_RANGE)

    @property
    def penalties(self) -> Penalties:
        """The three penalties together."""
        return Penalties(self.repetition_penalty, self.presence_penalty, self.frequency_penalty)

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also false for NaN
        bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise InvalidParameterError(f"{name} is {value}; it must be {bound}")


def read_logit_bias(text: str) -> tuple[tuple[int, float], ...]:
    """OpenAI's ``logit_bias``, a JSON object of token id → bias; empty text is none.

    Raises:
        InvalidParameterError: anything else.
    """
    if not text:
        return ()
    try:
        values = json.loads(text)
        return tuple((int(token), float(bias)) for token, bias in values.items())
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidParameterError('logit_bias must be a JSON object of token ids, such as {"42": -5}') from error


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
