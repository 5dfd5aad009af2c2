"""Bodies of requests. A name that is not here is refused; the extensions are those of the client library's options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """Refuses names it does not know and values of other types (a text is no number)."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Lenient(BaseModel):
    """Leaves out names it does not know: clients send whole answers back, with whatever those had."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextPart(Lenient):
    """A text."""

    type: Literal["text"]
    text: str


class ImageUrl(Lenient):
    """Where the picture is."""

    url: str = Field(description="data:image/png;base64,… ; or an address on a host that the server may fetch from")
    detail: str | None = None


class ImageUrlPart(Lenient):
    """A picture, as OpenAI's clients send it."""

    type: Literal["image_url"]
    image_url: ImageUrl | str


class ImagePart(Lenient):
    """A picture in base64."""

    type: Literal["image"]
    image: str


Part = Annotated[TextPart | ImageUrlPart | ImagePart, Field(discriminator="type")]


class CalledFunction(Lenient):
    """What the model called."""

    name: str
    arguments: str


class Call(Lenient):
    """An earlier call of the model's."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Lenient):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None


class StreamOptions(Lenient):
    """Of a streamed answer."""

    include_usage: bool = False


class Generation(Strict):
    """How an answer is drawn and when it ends; what every endpoint shares."""

    stream: bool = False
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: Number | None = Field(None, description="0, the default, takes the likeliest token.")
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    response_format: dict[str, Any] | None = Field(
        None, description="text, json_object, json_schema; also regex, choice and grammar."
    )
    priority: int | None = Field(None, description="Lower is served sooner.")
    queue_timeout_ms: int | None = None
    deadline_ms: int | None = None
    session: str | None = Field(None, description="A conversation whose KV cache is to be kept.")
    cache_salt: str | None = Field(None, description="Cached prompts are shared only between requests of one salt.")


class Sampling(Generation):
    """What chat and text completions share. What OpenAI's API does not have goes into its client's `extra_body`."""

    model: str | None = Field(None, description="As /v1/models names it; there is one.")
    stream_options: StreamOptions | None = None
    n: int | None = None
    # Known to OpenAI's API and without meaning here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = Field(None, description="False gives the first call alone.")


class CompletionRequest(Sampling):
    """POST /v1/completions. A prompt is one user turn, unless it holds turns already."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None


class EmbeddingRequest(Lenient):
    """POST /v1/embeddings, which no model here answers."""

    model: str | None = None
    input: Any = None
