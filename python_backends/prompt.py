"""What the user sends → token ids, the places of the pictures' soft tokens, and the encoded pictures.

To the token what transformers' `Gemma3Processor` makes of the same conversation, from the same tokenizer file and
template. It uses the libraries beneath transformers: `AutoTokenizer` costs 1.7 s and 260 MB where PyTorch is installed,
these 0.1 s and 35 MB.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from python_backends import chat, config, contract, manifest
from python_backends.chat_template import load_template
from python_backends.decoder.tools import read_request, render_tools
from python_backends.errors import (
    ArtifactError,
    ContextLengthError,
    EmptyPromptError,
    ImageCountError,
    ImagesNotSupportedError,
    InvalidMessagesError,
    InvalidRequestError,
    InvalidTextError,
)
from python_backends.pixels import ImageLimits, PanAndScan, allow_pixels, encoded_bytes, image_size, read_options
from python_backends.tool_turns import plain

Int32 = NDArray[np.int32]

TEXT_ONLY = "this model reads text only; leave the images out"


@dataclass(frozen=True)
class ImageTokens:
    """What pictures become in a prompt."""

    tokens_per_image: int
    pan_and_scan: PanAndScan | None
    limits: ImageLimits
    max_images: int


@dataclass(frozen=True)
class Prompt:
    """What the tokenizer stage answers."""

    input_ids: Int32
    """[T] with one BOS in front."""
    image_starts: Int32
    """[N] index of the first soft token of each picture and crop, in order."""
    image_bytes: list[bytes]
    """Encoded pictures in prompt order."""


class PromptTokenizer:
    """Tokenizer and chat template of one checkpoint.

    ``images`` is None for a text-only model. Raises ArtifactError where the files do not fit together.
    """

    def __init__(self, folder: Path, *, vocab_size: int, max_context_length: int, images: ImageTokens | None) -> None:
        self._vocab_size = vocab_size
        self._max_context_length = max_context_length
        self._images = images
        try:
            config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(f"no usable tokenizer in {folder}; run `wicore build` again: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        tokens = {"bos_token": "<bos>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        tokens |= _special_tokens(config)
        self._template = load_template(folder, tokens)
        self._bos = tokens["bos_token"]
        self._bos_id = self._id(self._bos, folder)
        self._image_token = tokens["image_token"]
        self._image_token_id = self._id(self._image_token, folder) if images else -1
        self._picture = ""
        if images:
            allow_pixels(images.limits)
            soft = self._image_token * images.tokens_per_image
            self._picture = f"\n\n{chat.START_OF_IMAGE}{soft}{tokens['eoi_token']}\n\n"
        self._longest_piece = max(map(len, self._tokenizer.get_vocab()))

    def _id(self, token: str, folder: Path) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ArtifactError(f"the tokenizer in {folder} has no {token}; is the checkpoint Gemma-3?")
        return int(found)

    def __call__(
        self,
        text_input: Sequence[bytes],
        messages: Sequence[bytes],
        images: Sequence[bytes],
        tools: Sequence[bytes] = (),
        tool_choice: Sequence[bytes] = (),
    ) -> Prompt:
        """The inputs as they arrive; absent ones are empty.

        Raises:
            InvalidRequestError: and its subclasses, each with what to change.
        """
        functions = _functions(tools, tool_choice)
        try:
            text, sent = self._text(text_input, messages, images, functions)
        except ImageCountError as error:
            if self._images is None:  # whatever the numbers
                raise ImagesNotSupportedError(TEXT_ONLY) from error
            raise
        if self._image_token in text:
            raise InvalidTextError(
                f"{self._image_token} stands for what the model sees and cannot be sent; "
                f"write {chat.START_OF_IMAGE} where a picture belongs"
            )
        encoded = self._encoded_images(text, sent)
        ids = self._encode(self._expand(text, encoded))
        return Prompt(ids, self._starts(ids), encoded)

    def _text(
        self, text_input: Sequence[bytes], messages: Sequence[bytes], images: Sequence[bytes], functions: str
    ) -> tuple[str, list[bytes]]:
        """The prompt with one ``<start_of_image>`` for each picture, and the pictures as sent."""
        if text_input and messages:
            raise InvalidRequestError("send text_input or messages, not both")
        if messages:
            if self._template is None:
                raise InvalidMessagesError("this model has no chat template; send text_input")
            conversation = chat.from_messages(messages[0], images, functions)
        else:
            text = chat.decode_text(text_input[0]) if text_input else ""
            if not text.strip() and not images:
                raise EmptyPromptError("the prompt has no text and no image; send text_input, messages or image")
            if chat.START_OF_TURN in text or self._template is None:
                if functions:
                    raise InvalidRequestError(
                        "tools need messages or a plain text for a model with a chat template; a prompt that is taken "
                        "as it is must describe its functions itself"
                    )
                return chat.templated(text, images)
            conversation = chat.from_text(text, images, functions)
        return self._template.render(conversation.messages), conversation.images

    def _encoded_images(self, text: str, sent: Sequence[bytes]) -> list[bytes]:
        places = text.count(chat.START_OF_IMAGE)
        if self._images is None:
            if sent or places:
                raise ImagesNotSupportedError(TEXT_ONLY)
            return []
        chat.check_placeholders(places, len(sent))
        if places > self._images.max_images:
            raise ImageCountError(f"{places} images; this server takes at most {self._images.max_images} a request")
        return [encoded_bytes(value, self._images.limits) for value in sent]

    def _expand(self, text: str, encoded: Sequence[bytes]) -> str:
        """Write each picture's soft tokens out, and its crops' (`Gemma3Processor.replace_image_token`)."""
        if self._images is None:
            return text
        first, *others = text.split(chat.START_OF_IMAGE)
        pairs = zip(encoded, others, strict=True)
        return first + "".join(self._replacement(data, self._images) + after for data, after in pairs)

    def _replacement(self, data: bytes, images: ImageTokens) -> str:
        width, height = image_size(data, images.limits)
        crops = len(images.pan_and_scan.boxes(width, height)) if images.pan_and_scan else 0
        if not crops:
            return self._picture
        views = " ".join([self._picture] * crops)
        return f"Here is the original image {self._picture} and here are some crops to help you see better {views}"

    def _encode(self, text: str) -> Int32:
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise InvalidTextError(f"the text holds a lone surrogate (character {error.start})") from error
        # No token covers more characters than the longest piece, so this many are certain without tokenizing.
        self._check_length(len(text) // self._longest_piece, f"at least ({size:,} bytes of text) ")
        # Of the library's calls the batch ones let go of the interpreter lock, and the fast one skips the offsets.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int32)
        if not len(ids) or ids[0] != self._bos_id:
            ids = np.insert(ids, 0, self._bos_id)
        self._check_length(len(ids), "")
        if int(ids.max()) >= self._vocab_size:
            token = self._tokenizer.id_to_token(int(ids.max()))
            raise InvalidTextError(f"the text holds {token}, for which this model has no embedding")
        return ids

    def _check_length(self, tokens: int, how: str) -> None:
        if tokens >= self._max_context_length:
            raise ContextLengthError(
                f"the prompt has {how}{tokens:,} tokens; with an answer it must fit "
                f"{self._max_context_length:,} tokens of context"
            )

    def _starts(self, ids: Int32) -> Int32:
        soft = ids == self._image_token_id
        return np.flatnonzero(soft & ~np.roll(soft, 1)).astype(np.int32)


def _functions(tools: Sequence[bytes], tool_choice: Sequence[bytes]) -> str:
    """What the prompt says about the functions; empty where none may be called."""
    texts = (chat.decode_text(values[0]) if values else "" for values in (tools, tool_choice))
    found, choice = read_request(*texts)
    return plain(render_tools(found, choice)) if found else ""


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The variables that transformers hands to a template: bos_token, eos_token, …"""
    found = {}
    for name, value in config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            found[name] = token
    return found


def open_tokenizer(repository: Path) -> PromptTokenizer:
    """The tokenizer of a built repository, with the limits of its configuration.

    Raises:
        ArtifactError, ConfigError: see `manifest.load`, `config.load`, `read_options`.
    """
    settings = config.load(repository)
    built = manifest.load(repository, [contract.TOKENIZER, contract.IMAGE_PROCESSOR])
    return open_files(built.folder, built.model, settings)


def open_files(folder: Callable[[str], Path], model: manifest.ModelShape, settings: config.Config) -> PromptTokenizer:
    """The same from the folders of the stages; `wicore build` tries its files with it before they replace others.

    Raises:
        ArtifactError: files that are missing, damaged or not Gemma-3's.
    """
    images = None
    if model.image:
        processor = folder(contract.IMAGE_PROCESSOR)
        images = ImageTokens(
            tokens_per_image=model.image.tokens_per_image,
            pan_and_scan=read_options(processor, pan_and_scan=settings.pan_and_scan).pan_and_scan,
            limits=ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
            max_images=settings.max_images,
        )
    return PromptTokenizer(
        folder(contract.TOKENIZER),
        vocab_size=model.vocab_size,
        max_context_length=min(settings.max_context_length, model.max_context_length),
        images=images,
    )
