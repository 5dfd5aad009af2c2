"""`wicore describe` and what it shares with `wicore chat`: asking, and showing the answer as it comes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.commands.options import Address, AsJson, MaxTokens, Seed, Temperature, TopK, TopP
from client.commands.terminal import command, emit, print_stream
from client.connection import DEFAULT_ADDRESS

if TYPE_CHECKING:
    from client import Answer, Client, ImageLike, Messages, Options

QUESTIONS = {"en": "Describe the picture.", "zh": "描述一下这张图。"}
Language = Annotated[str, typer.Option("--lang", help="Language of the question where none is given: en or zh.")]


def sampling(
    max_tokens: int | None, temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None
) -> Options:
    """The options that were given."""
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    return {name: value for name, value in given.items() if value is not None}  # type: ignore[return-value]


def ask(
    client: Client, messages: Messages, images: list[ImageLike], options: Options, *, as_json: bool = False
) -> Answer:
    """Ask, print the answer while it comes (as JSON: once, whole), and return it.

    Raises:
        WiCoreError: as `Client`. KeyboardInterrupt stops the request on its way out.
    """
    from contextlib import closing

    from client.answer import AnswerBuilder
    from client.calls import new_request_id

    if as_json:
        answer = client.generate(messages=messages, images=images, **options)
        emit(answer.as_dict())
        return answer
    request_id = new_request_id()
    builder = AnswerBuilder(request_id)
    begin = time.perf_counter()
    with closing(client.stream(messages=messages, images=images, request_id=request_id, **options)) as pieces:
        for piece in print_stream(pieces):
            builder.add(piece, time.perf_counter() - begin)
    return builder.finish(time.perf_counter() - begin)


def user_message(text: str, num_images: int) -> dict[str, object]:
    """A user's turn: its pictures, then its text."""
    return {"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


@command
def describe(
    image: Annotated[Path, typer.Argument(help="PNG, JPEG, WebP, GIF, BMP or TIFF file; - reads standard input.")],
    question: Annotated[str | None, typer.Argument(help="What to ask. [default: Describe the picture.]")] = None,
    *,
    language: Language = "en",
    address: Address = DEFAULT_ADDRESS,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Ask a running server about a picture; the answer is printed while it is decoded.

    wicore describe photo.jpg

    wicore describe chart.png "Which bar is the highest?" --json
    """
    from client import Client

    if language not in QUESTIONS:
        raise typer.BadParameter(f"{language!r} is not one of {', '.join(QUESTIONS)}", param_hint="--lang")
    picture: ImageLike = sys.stdin.buffer.read() if str(image) == "-" else image
    options = sampling(max_tokens, temperature, top_p, top_k, seed)
    with Client(address) as client:
        ask(client, [user_message(question or QUESTIONS[language], 1)], [picture], options, as_json=as_json)
