"""`wicore chat`: a conversation with a running server, by a person or through a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.commands.ask import ask, sampling, user_message
from client.commands.options import Address, AsJson, MaxTokens, Seed, Temperature, TopK, TopP
from client.commands.terminal import colour, command, report, say
from client.connection import DEFAULT_ADDRESS
from python_backends.errors import WiCoreError

if TYPE_CHECKING:
    from client import Client, Options

HELP = """/image PATH   show a picture with your next message (again for several)
/reset        forget the conversation
/help         this list
/quit         leave (so does Ctrl-D); Ctrl-C stops an answer"""


class Conversation:
    """The turns so far. A turn that fails leaves no trace, so that the next one can be asked."""

    def __init__(self, client: Client, options: Options, system: str | None, *, as_json: bool) -> None:
        self._client = client
        self._options = options
        self._system = system
        self._as_json = as_json
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self._system}] if self._system else []
        self.images: list[Path | str | bytes] = []
        self.waiting: list[bytes] = []
        """Pictures for the next message."""

    def show(self, path: Path) -> None:
        """Keep a picture for the next message.

        Raises:
            InvalidImageError: the file cannot be read.
        """
        from client.request import encoded

        self.waiting.append(encoded(path))

    def say(self, text: str) -> None:
        """A turn of the user and the answer to it.

        Raises:
            WiCoreError: the turn is dropped, its pictures stay for the next.
            KeyboardInterrupt: the answer was stopped; the turn is dropped.
        """
        messages = [*self.messages, user_message(text, len(self.waiting))]
        images = [*self.images, *self.waiting]
        answer = ask(self._client, messages, list(images), self._options, as_json=self._as_json)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self.images, self.waiting = images, []


@command
def chat(
    *,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to begin with; may be given again.")] = None,
    system: Annotated[str | None, typer.Option(help="Instructions that hold for the whole conversation.")] = None,
    address: Address = DEFAULT_ADDRESS,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Talk with a running server, over pictures too.

    Lines are turns; /image PATH shows a picture, /help lists the rest. Through a pipe every line is a turn and only
    answers are printed; the first failure ends it.

    wicore chat --image photo.jpg

    printf 'What is 2+2?\\nAnd times 3?\\n' | wicore chat --json
    """
    from client import Client

    with Client(address) as client:
        talk = Conversation(client, sampling(max_tokens, temperature, top_p, top_k, seed), system, as_json=as_json)
        for path in image or []:
            talk.show(path)
        if not sys.stdin.isatty():
            for line in sys.stdin:
                if line.strip() and not take(talk, line.strip()):
                    break
            return
        say(f"Connected to {address}. /help lists commands, Ctrl-D leaves.")
        with _line_editing():
            _talk(talk, as_json=as_json)


def take(talk: Conversation, line: str) -> bool:
    """Do what a line says; False where it is to leave.

    Raises:
        WiCoreError: from the server, or a picture that cannot be read.
    """
    word, _, rest = line.partition(" ")
    if word in {"/quit", "/exit"}:
        return False
    if word == "/reset":
        talk.reset()
    elif word == "/help":
        say(HELP)
    elif word == "/image" and rest.strip():
        talk.show(Path(rest.strip().strip("'\"")).expanduser())
        say(f"({len(talk.waiting)} picture{'s' if len(talk.waiting) > 1 else ''} for your next message)")
    elif line.startswith("/") and "/" not in word[1:]:
        say(f"There is no {word}.\n{HELP}")
    else:
        talk.say(line)
    return True


def _talk(talk: Conversation, *, as_json: bool) -> None:
    going = True
    while going:
        try:
            line = input("> ").strip()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("")
            continue
        try:
            going = not line or take(talk, line)
        except KeyboardInterrupt:
            say(colour("(stopped)", "33"))
        except WiCoreError as error:
            report(error, as_json=as_json)


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Arrow keys and a history across sessions, readable by its owner alone."""
    import readline  # importing it is what gives input() its editing

    path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "wicore" / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
