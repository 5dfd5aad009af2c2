"""A request, the sequences that answer it, and the pieces its answers come in."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_backends.decoder.adjustments import Adjustments
from python_backends.decoder.drafts import DraftGain, PromptLookup
from python_backends.decoder.grammar import Grammar, Matcher
from python_backends.decoder.parameters import Parameters
from python_backends.decoder.tool_calls import ToolCall
from python_backends.decoder.tools import Tool
from python_backends.errors import ContextLengthError, ImageCountError, InvalidParameterError, WiCoreError
from python_backends.kv.blocks import TIERS
from python_backends.runtime.base import DecoderSpec, Float32, SlotState

if TYPE_CHECKING:
    from python_backends.decoder.reuse import Reused
    from python_backends.kv.hit import Hit

TopLogprobs = tuple[tuple[int, float], ...]
"""(token id, log-probability) of the most likely tokens at one position, in falling order."""


@dataclass(frozen=True)
class CachedTokens:
    """What of a prompt came from the KV cache instead of being computed."""

    by_tier: Mapping[str, int] = field(default_factory=dict)
    missed: str = "off"
    """Why it was not more: a `MissReason`, "" where it was all that can be, "off" without a cache."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer."""

    prompt_tokens: int
    completion_tokens: int
    cached: CachedTokens = CachedTokens()

    def as_json(self) -> dict[str, object]:
        """The ``usage`` output."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "cached_tokens": {tier: self.cached.by_tier.get(tier, 0) for tier in TIERS},
            "cache_miss": self.cached.missed,
        }


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probability of each prompt token given those before it, from the second token on."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[TopLogprobs, ...]


@dataclass(frozen=True)
class Piece:
    """A part of an answer. The last has a finish reason: stop, length, tool_calls, cancelled, deadline or error."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    index: int = 0
    """Which of the request's ``n`` answers."""
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
    finish_reason: str = ""
    usage: Usage | None = None
    error: WiCoreError | None = None
    begun_s: float | None = None
    """Of the last: when the sequence's first step began, on the engine's clock; None where none did."""


@dataclass
class Request:
    """A prompt and where its answers go.

    ``sink`` is called from one thread, in order, for each answer the last time with a finish reason. ``is_cancelled``
    is asked every few milliseconds.
    """

    input_ids: Sequence[int]
    parameters: Parameters
    sink: Callable[[Piece], None]
    image_starts: Sequence[int] = ()
    image_features: Float32 | None = None
    """[images × tokens per image, D], from image ``encoded_from`` on."""
    encoded_from: int = 0
    """Images before it have no embeddings: the KV cache holds what was computed from them."""
    encode_rest: Callable[[], Float32 | None] | None = None
    """The embeddings of the images before ``encoded_from``, for where their KV is lost meanwhile; it may take long."""
    image_hashes: Sequence[bytes] = ()
    """32 bytes for each image: hash of its pixels."""
    cache_salt: str = ""
    """Requests share KV with those of the same salt only."""
    session: str = ""
    """Name under which the cache finds what this request leaves; none: no name."""
    hit: Hit | None = None
    """What the cache holds of the prompt, where it was looked up already (`Engine.look_up`)."""
    request_id: str = ""
    traceparent: str = ""
    """The trace that it belongs to (`tracing`); none: no trace."""
    arrived_s: float | None = None
    """On the engine's clock, where its times count from before `Engine.submit`."""
    is_cancelled: Callable[[], bool] = lambda: False
    grammar: Grammar | None = None
    tools: Sequence[Tool] = ()

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
        biased = (token for token, _ in self.parameters.logit_bias)
        ids = (*self.input_ids, *self.parameters.stop_token_ids, *biased)
        if min(ids) < 0 or max(ids) >= spec.vocab_size:
            raise InvalidParameterError(f"token ids must lie in 0 … {spec.vocab_size - 1}")
        placeholders = sum(1 for token in self.input_ids if token == spec.image_token_id)
        given = self.encoded_from * spec.tokens_per_image
        given += 0 if self.image_features is None else len(self.image_features)
        if placeholders != given or len(self.image_starts) * spec.tokens_per_image != given:
            raise ImageCountError(f"the prompt has {placeholders} image tokens for {given} image embeddings")


@dataclass
class ActiveSequence:
    """One answer in the making; touched by the engine's thread alone, but for ``cancelled`` and ``stopped``."""

    sequence_id: int
    request: Request
    index: int
    max_tokens: int
    queue_deadline_s: float
    deadline_s: float
    tokens: list[int]
    """Prompt and answer so far."""
    seed: int
    submitted_s: float
    adjustments: Adjustments | None
    matcher: Matcher | None
    lookup: PromptLookup | None
    """None where drafts are off."""
    gain: DraftGain = field(default_factory=DraftGain)
    draft: list[int] = field(default_factory=list)
    """Guesses for the tokens after the next one, checked in the next step."""
    reused: Reused | None = None
    """Its side of the KV cache; None without one."""
    cached: CachedTokens = CachedTokens()
    failure: WiCoreError | None = None
    """Why it cannot go on; set by a thread that did something for it."""
    state: SlotState | None = None
    """The KV while the sequence is set aside, or before a shared beginning is put into its slot."""
    cancelled: bool = False
    """Set by the thread that watches callers."""
    begun_s: float | None = None
    """When its first step began."""
    stopped: bool = False
    """Set by the answer writer when a stop string was found."""
    prompt_parts: list[PromptLogprobs] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.input_ids)

    @property
    def answered(self) -> int:
        """Tokens of the answer."""
        return len(self.tokens) - self.prompt_length


def make_sequence(
    request: Request, sequence_id: int, index: int, seed: int, *, spec: DecoderSpec, max_draft: int, now: float
) -> ActiveSequence:
    """Answer number ``index`` of a request that was submitted ``now`` (s)."""
    parameters = request.parameters
    banned = (*spec.eos_token_ids, *parameters.stop_token_ids) if parameters.min_tokens else ()
    adjusts = bool(parameters.logit_bias or banned) or not parameters.penalties.neutral
    bias = dict(parameters.logit_bias)
    adjustments = Adjustments(parameters.penalties, bias, request.input_ids, banned) if adjusts else None
    # Penalties count what a draft would still have to draw, so they and drafts exclude each other.
    drafts = max_draft and parameters.penalties.neutral and not banned
    return ActiveSequence(
        sequence_id=sequence_id,
        request=request,
        index=index,
        max_tokens=min(parameters.max_tokens, spec.max_context_length - len(request.input_ids)),
        queue_deadline_s=now + parameters.queue_timeout_ms / 1000,
        deadline_s=now + parameters.deadline_ms / 1000,
        tokens=list(request.input_ids),
        seed=seed,
        submitted_s=now,
        adjustments=adjustments,
        matcher=request.grammar.matcher() if request.grammar else None,
        lookup=PromptLookup(request.input_ids) if drafts else None,
    )


def seeds(parameters: Parameters) -> list[int]:
    """One seed per answer: the request's and those after it, or random ones."""
    first = secrets.randbits(63) if parameters.seed is None else parameters.seed
    return [(first + index) % 2**64 for index in range(parameters.n)]
