"""Every tensor of every model of the ensemble, once.

The literal ``config.pbtxt`` files are tested against these tables, the stages read and write tensors through them, and
the client takes its names from them. Dims leave out the batch dimension; every request carries exactly one prompt, so
that dimension is always 1 (TensorRT-LLM's convention, which existing clients and benchmarks follow).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TritonType = Literal["TYPE_STRING", "TYPE_INT32", "TYPE_INT64", "TYPE_UINT64", "TYPE_FP32", "TYPE_BOOL", "TYPE_UINT8"]

ENSEMBLE = "gemma3"
TOKENIZER = "tokenizer"
IMAGE_PROCESSOR = "image_processor"
VISION_ENCODER = "vision_encoder"
DECODER = "decoder"
STAGES = (TOKENIZER, IMAGE_PROCESSOR, VISION_ENCODER, DECODER)

LINE = "wicore_line"
"""Request parameter, which an ensemble hands to every stage: the line (`decoder.lines`) that the request ends with."""


@dataclass(frozen=True)
class Tensor:
    """One tensor: its Triton type and its dims without the batch dimension (−1 is variable)."""

    name: str
    dtype: TritonType
    dims: tuple[int, ...] = (1,)
    optional: bool = False


@dataclass(frozen=True)
class Model:
    """Inputs and outputs of one Triton model."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def input(self, name: str) -> Tensor:
        """The input tensor of that name."""
        return next(tensor for tensor in self.inputs if tensor.name == name)


def _optional(name: str, dtype: TritonType, dims: tuple[int, ...] = (1,)) -> Tensor:
    return Tensor(name, dtype, dims, optional=True)


# Both sides of a tool call: the prompt describes the functions, the decoder finds the calls.
TOOLS = (
    _optional("tools", "TYPE_STRING"),  # OpenAI's list as JSON
    _optional("tool_choice", "TYPE_STRING"),
)

# What the user sends about the prompt; the tokenizer stage turns it into ids.
PROMPT = (
    _optional("text_input", "TYPE_STRING"),
    _optional("messages", "TYPE_STRING"),  # the OpenAI list as JSON
    _optional("image", "TYPE_STRING", (-1,)),  # encoded bytes, base64 or a data URL
    *TOOLS,
)

# What the user sends about the answer; goes straight to the decoder.
GENERATION = (
    _optional("max_tokens", "TYPE_INT32"),
    _optional("min_tokens", "TYPE_INT32"),
    _optional("temperature", "TYPE_FP32"),
    _optional("top_k", "TYPE_INT32"),
    _optional("top_p", "TYPE_FP32"),
    _optional("min_p", "TYPE_FP32"),
    _optional("seed", "TYPE_UINT64"),
    _optional("repetition_penalty", "TYPE_FP32"),
    _optional("presence_penalty", "TYPE_FP32"),
    _optional("frequency_penalty", "TYPE_FP32"),
    _optional("logit_bias", "TYPE_STRING"),
    _optional("n", "TYPE_INT32"),
    _optional("stop", "TYPE_STRING", (-1,)),
    _optional("stop_token_ids", "TYPE_INT32", (-1,)),
    _optional("ignore_eos", "TYPE_BOOL"),
    _optional("echo", "TYPE_BOOL"),
    _optional("stream", "TYPE_BOOL"),
    _optional("logprobs", "TYPE_INT32"),
    _optional("prompt_logprobs", "TYPE_INT32"),
    _optional("response_format", "TYPE_STRING"),
    _optional("priority", "TYPE_INT32"),
    _optional("queue_timeout_ms", "TYPE_INT32"),
    _optional("deadline_ms", "TYPE_INT32"),
    _optional("session", "TYPE_STRING"),
    _optional("cache_salt", "TYPE_STRING"),
    _optional("request_id", "TYPE_STRING"),
    _optional("command", "TYPE_STRING"),
)

# What the tokenizer hands on.
INPUT_IDS = _optional("input_ids", "TYPE_INT32", (-1,))
IMAGE_STARTS = _optional("image_starts", "TYPE_INT32", (-1,))  # first placeholder of each picture or crop, in order
IMAGE_BYTES = Tensor("image_bytes", "TYPE_STRING", (-1,))  # encoded images in prompt order; none for text
PIXELS = Tensor("pixels", "TYPE_UINT8", (-1, 3, -1, -1))  # pictures and crops in prompt order, RGB
# One image is one batch row of the vision encoder, so that the dynamic batcher and the response cache see images.
VISION_PIXELS = Tensor("pixels", "TYPE_UINT8", (3, -1, -1))
IMAGE_FEATURES = Tensor("image_features", "TYPE_FP32", (-1, -1))  # [tokens per image, hidden size]

ANSWER = (
    Tensor("text_output", "TYPE_STRING"),
    Tensor("token_ids", "TYPE_INT32", (-1,)),
    Tensor("index", "TYPE_INT32"),  # which of the n answers
    # "" until an answer's last response: stop, length, tool_calls, cancelled, deadline, error
    Tensor("finish_reason", "TYPE_STRING"),
    Tensor("tool_calls", "TYPE_STRING"),  # JSON, OpenAI's list
    Tensor("usage", "TYPE_STRING"),  # JSON, on the last response
    # One per token in token_ids. Not "logprobs": an ensemble has one namespace, and that is the input.
    Tensor("token_logprobs", "TYPE_FP32", (-1,)),
    Tensor("top_logprobs", "TYPE_STRING"),  # JSON: for each token in token_ids a list of [id, logprob]
    Tensor("prompt_token_logprobs", "TYPE_STRING"),  # JSON {token_ids, logprobs, top}, on the first response
    Tensor("error_code", "TYPE_STRING"),
)

MODELS = {
    ENSEMBLE: Model(ENSEMBLE, PROMPT + GENERATION, ANSWER),
    TOKENIZER: Model(TOKENIZER, PROMPT, (INPUT_IDS, IMAGE_STARTS, IMAGE_BYTES)),
    IMAGE_PROCESSOR: Model(IMAGE_PROCESSOR, (IMAGE_BYTES,), (PIXELS,)),
    VISION_ENCODER: Model(VISION_ENCODER, (VISION_PIXELS,), (IMAGE_FEATURES,)),
    DECODER: Model(
        DECODER,
        (INPUT_IDS, IMAGE_STARTS, Tensor("pixels", "TYPE_UINT8", (-1, 3, -1, -1), optional=True), *TOOLS, *GENERATION),
        ANSWER,
    ),
}
