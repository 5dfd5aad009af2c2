"""`wicore demo`: the model that comes along, from its checkpoint to an answer, and how often it is right."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from client.commands.ask import QUESTIONS, Language, ask, user_message
from client.commands.options import DEFAULT_REPOSITORY, AsJson
from client.commands.serve import ready_line
from client.commands.terminal import Status, colour, command, emit, say
from python_backends.errors import ArtifactError, BuildError

if TYPE_CHECKING:
    from builders.build import Result
    from client.server import Server

PrecisionName = Literal["fp32", "fp16", "int8", "int4"]
PRECISION: PrecisionName = "int8"
BLOCK = 32
"""What `wicore build` takes by default, so that building the demo by hand gives the same repository."""
CONCURRENCY = 16


Checkpoint = Annotated[Path | None, typer.Option(help="Another checkpoint of the same kind. [default: the one here]")]


class Engine(enum.StrEnum):
    """What answers in an evaluation."""

    TRANSFORMERS = "transformers"
    ONNX = "onnx"
    SERVER = "server"


def checkpoint_folder() -> Path:
    """The demo checkpoint.

    Raises:
        BuildError: it is not there.
    """
    import builders.demo

    folder = Path(builders.demo.__file__).parent / "checkpoint"
    if not (folder / "config.json").exists() or not list(folder.glob("*.safetensors")):
        raise BuildError(f"{folder} holds no demo checkpoint; is this a complete clone of WiCore?")
    return folder


def build_demo(
    repository: Path, checkpoint: Path | None = None, precision: PrecisionName = PRECISION
) -> tuple[Path, Result]:
    """Build the demo checkpoint where it is not built yet; a repository of another model is left alone.

    Returns:
        The repository used, and what the build found or did.

    Raises:
        BuildError: the checkpoint is missing or cannot be built.
    """
    from builders.build import Options, build
    from builders.quantize import Precision
    from client.server.installation import cache_folder

    checkpoint = checkpoint or checkpoint_folder()
    if _holds_another_model(repository, checkpoint):
        repository = cache_folder() / "demo_repository"
    return repository, build(checkpoint, repository, Options(Precision(precision, BLOCK)))


def _holds_another_model(repository: Path, checkpoint: Path) -> bool:
    from python_backends import manifest

    try:
        return manifest.read(repository).name != checkpoint.name
    except ArtifactError:
        return False


@contextmanager
def demo_server(repository: Path, on_progress: Any = None) -> Iterator[Server]:
    """A server of its own for ``repository``, on free ports."""
    from client.server import Server, ServerOptions

    with Server(ServerOptions(repository, http_port=0, grpc_port=0, metrics_port=0), on_progress) as server:
        yield server


def sample(seed: int, language: str) -> tuple[Any, str, str]:
    """A held-out picture (Pillow), a question about it, and the right answer."""
    from builders.demo.drawing import render
    from builders.demo.questions import HELD_OUT, conversation

    rng = random.Random(f"demo/{language}/{seed}")
    while True:
        talk = conversation(HELD_OUT, seed, rng.randrange(2**32))
        turn = talk.turns[0]
        if turn.pictures == 1 and turn.language == language and turn.category == "describe":
            return render(talk.scenes[0]), turn.user or QUESTIONS[language], turn.answer


@command
def run(
    *,
    picture: Annotated[Path | None, typer.Option(help="Ask about this file instead of a drawing.")] = None,
    question: Annotated[str | None, typer.Option(help="Ask this. [default: one that comes with the drawing]")] = None,
    language: Language = "en",
    seed: Annotated[int, typer.Option(help="Which held-out drawing.")] = 0,
    repository: Annotated[
        Path, typer.Option(help="Model repository to build the demo in; one that holds another model is left alone.")
    ] = DEFAULT_REPOSITORY,
    checkpoint: Checkpoint = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep serving after the answer, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build the demo model, serve it from Triton, ask about a picture, and stop everything again.

    The drawing and the question are held out: the model has not been trained on them. Exit code 1 where its answer is
    not the right one.
    """
    if language not in QUESTIONS:
        raise typer.BadParameter(f"{language!r} is not one of {', '.join(QUESTIONS)}", param_hint="--lang")
    status = Status()
    status("building the model repository …")
    repository, built = build_demo(repository, checkpoint)
    status.clear()
    done = "up to date" if built.up_to_date else f"built in {built.seconds:.1f} s"
    say(f"{colour('Repository', '36')}  {repository} ({built.manifest.precision}, {done})")
    path, asked, expected = _subject(picture, question, language, seed)
    with demo_server(repository, status) as server:
        status.clear()
        say(f"{colour('Server', '36')}      tritonserver, {server.addresses.http}, {server.addresses.grpc} (gRPC)")
        right = _ask(server, path, asked, expected, language, as_json=as_json)
        if keep:
            if as_json:
                emit(ready_line(server))
            say("Still serving; Ctrl-C stops.")
            server.wait()
        status("stopping …")
    status.clear()
    if right is False:
        raise typer.Exit(1)


@command
def draw(
    path: Annotated[Path, typer.Argument(help="Where to write the PNG.")],
    *,
    language: Language = "en",
    seed: Annotated[int, typer.Option(help="Which held-out drawing.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Draw a held-out picture to ask about, and tell a question with its right answer."""
    if language not in QUESTIONS:
        raise typer.BadParameter(f"{language!r} is not one of {', '.join(QUESTIONS)}", param_hint="--lang")
    image, question, expected = sample(seed, language)
    image.save(path)
    if as_json:
        emit({"picture": str(path), "question": question, "expected": expected})
        return
    print(f"{path}\nQuestion: {question}\nRight answer: {expected}")


def _subject(picture: Path | None, question: str | None, language: str, seed: int) -> tuple[Path, str, str | None]:
    """The picture's file, the question, and the right answer where it is known."""
    from client.server.installation import cache_folder

    if picture is not None:
        return picture, question or QUESTIONS[language], None
    image, asked, expected = sample(seed, language)
    path = cache_folder() / "demo" / f"drawing-{language}-{seed}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path, question or asked, None if question and question != asked else expected


def _ask(
    server: Server, path: Path, question: str, expected: str | None, language: str, *, as_json: bool
) -> bool | None:
    """Ask, print, and tell whether the answer is right; None where that is not known."""
    from builders.demo.scoring import is_right
    from client import Client

    say(f"{colour('Picture', '36')}     {path}")
    say(f"{colour('Question', '36')}    {question}")
    with Client(server.addresses.grpc) as client:
        messages, images = [user_message(question, 1)], [path]
        if as_json:
            answer = client.generate(messages=messages, images=list(images))
        else:
            answer = ask(client, messages, list(images), {})
    right = None if expected is None else is_right(answer.text, expected, "describe", language)
    if as_json:
        emit({**answer.as_dict(), "picture": str(path), "question": question, "expected": expected, "right": right})
        return right
    verdict = {True: colour("right", "32"), False: f"{colour('wrong', '31')}; right is: {expected}", None: ""}[right]
    if verdict:
        say(f"{colour('Verdict', '36')}     {verdict}")
    say(
        f"{colour('Speed', '36')}       first token after {answer.ttft_s * 1000:.0f} ms, then "
        f"{answer.tokens_per_s:.0f} tokens/s ({answer.usage.prompt_tokens} prompt tokens, "
        f"{answer.usage.completion_tokens} answer tokens)"
    )
    return right


@command
def evaluate(
    *,
    engine: Annotated[Engine, typer.Option(help="What answers.")] = Engine.TRANSFORMERS,
    n: Annotated[
        int, typer.Option("-n", min=1, help="Held-out conversations; each asks four to five questions.")
    ] = 200,
    seed: Annotated[int, typer.Option(help="Of the held-out stream.")] = 0,
    checkpoint: Checkpoint = None,
    precision: Annotated[PrecisionName, typer.Option(help="Of the engines onnx and server.")] = PRECISION,
    as_json: AsJson = False,
) -> None:
    """Ask the demo model about held-out pictures, greedily, and count how often it is right.

    transformers runs the checkpoint itself and is the reference (it needs PyTorch: `pip install 'wicore[train]'`); onnx
    runs the built model in this process; server asks a real tritonserver.
    """
    from builders.demo.evaluate import evaluate_batches, run_transformers

    if engine is Engine.TRANSFORMERS:
        _require_torch()
        report = run_transformers(checkpoint or checkpoint_folder(), n, seed)
    else:
        with _answerer(engine, checkpoint or checkpoint_folder(), precision) as answer:
            report = evaluate_batches(answer, n, seed, CONCURRENCY)
    if as_json:
        emit({"engine": engine.value, **report.as_json()})
    else:
        print(report.table())


def _require_torch() -> None:
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise BuildError("transformers needs PyTorch: `pip install 'wicore[train]'`, or use --engine server")


@contextmanager
def _answerer(engine: Engine, checkpoint: Path, precision: PrecisionName) -> Iterator[Any]:
    """A function from requests (messages, images) to texts."""
    from client.server.installation import cache_folder

    repository, _ = build_demo(cache_folder() / f"{checkpoint.name}_{precision}", checkpoint, precision)
    if engine is Engine.ONNX:
        from client.commands.in_process import in_process_answerer

        with in_process_answerer(repository, checkpoint) as answer:
            yield answer
        return
    with demo_server(repository) as server, server_answerer(server.addresses.grpc) as answer:
        yield answer


@contextmanager
def server_answerer(address: str) -> Iterator[Any]:
    """As `builders.demo.evaluate` takes it: many conversations at a time, each a request of its own."""
    from concurrent.futures import ThreadPoolExecutor

    from builders.demo.evaluate import MAX_NEW_TOKENS, Request
    from client import Client

    with Client(address) as client, ThreadPoolExecutor(CONCURRENCY) as pool:

        def one(request: Request) -> str:
            messages, images = request
            return client.generate(messages=messages, images=images, max_tokens=MAX_NEW_TOKENS, temperature=0).text

        def answer(requests: Sequence[Request]) -> list[str]:
            return list(pool.map(one, requests))

        yield answer
