"""What all commands share: streamed answers, one-line errors, exit codes, and JSON lines for scripts."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import typer

from python_backends.errors import InternalError, WiCoreError

if TYPE_CHECKING:
    from client.answer import Piece

P = ParamSpec("P")
T = TypeVar("T")

EXIT_FAILED = 1
EXIT_CTRL_C = 130
DEBUG = "WICORE_DEBUG"


def debugging() -> bool:
    """Whether the user wants tracebacks."""
    return bool(os.environ.get(DEBUG))


def command(function: Callable[P, T]) -> Callable[P, T]:
    """A subcommand whose failures are one line on standard error (with --json, one on standard output) and a code."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        as_json = bool(kwargs.get("as_json"))
        try:
            with ending_signals():
                return function(*args, **kwargs)
        except KeyboardInterrupt:
            say("")
            raise typer.Exit(EXIT_CTRL_C) from None
        except BrokenPipeError:
            # Whoever read our output has enough. The interpreter would complain when it flushes at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(128 + signal.SIGPIPE) from None
        except WiCoreError as error:
            if debugging():
                raise
            report(error, as_json=as_json)
            raise typer.Exit(EXIT_FAILED) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if debugging():
                raise
            text = f"{type(error).__name__}: {error} (a fault of WiCore; {DEBUG}=1 shows where)"
            report(InternalError(text), as_json=as_json)
            raise typer.Exit(EXIT_FAILED) from None

    return run


def report(error: WiCoreError, *, as_json: bool) -> None:
    """Tell of an error."""
    if as_json:
        emit({"error": {"code": error.code, "message": error.message}})
    else:
        say(f"{colour('wicore:', '31')} {error.message}")


def emit(value: dict[str, Any]) -> None:
    """One JSON object on a line of its own."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def say(text: str) -> None:
    """A line for a person, on standard error, so that standard output holds answers alone."""
    print(text, file=sys.stderr, flush=True)


def colour(text: str, code: str) -> str:
    """Text in an ANSI colour where standard error is a terminal and NO_COLOR is not set."""
    shown = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    return f"\x1b[{code}m{text}\x1b[0m" if shown else text


class Status:
    """One line on a terminal that is written over; elsewhere nothing, so that logs stay readable."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def __call__(self, text: object) -> None:
        """Show this instead of what was shown."""
        if self._shown:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line away."""
        self("")


def print_stream(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Pass pieces on, printing their text as it arrives, and end the line whatever happens."""
    printed = False
    try:
        for piece in pieces:
            print(piece.text, end="", flush=True)
            printed = printed or bool(piece.text)
            yield piece
    finally:
        if printed:
            print(flush=True)


@contextmanager
def ending_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the program as Ctrl-C does, so that what it started is stopped."""

    def leave(signum: int, _: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
