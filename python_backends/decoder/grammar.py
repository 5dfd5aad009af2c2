"""Structured output: which tokens keep an answer within its `response_format`, as bit masks.

llguidance does the matching (Earley over a lazily built lexer). Masks are exact: a token is allowed if and only if the
answer so far and its bytes are a prefix of some answer in the language, so sampling draws from the model's own
distribution restricted to that, token by token. End-of-sequence ids are allowed only where the answer is complete.

A grammar is compiled for each request (about a millisecond) and shares its lexer cache with nothing but the forks of
its own request, so one request's cost and limits never depend on another's.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import llguidance
import numpy as np
from numpy.typing import NDArray

from python_backends.decoder import response_format as formats
from python_backends.decoder.token_bytes import TokenBytes
from python_backends.errors import InternalError, InvalidParameterError, OverloadedError

COMPILE_SECONDS = 10.0
"""A compilation that takes longer is refused; what is left after the limits of `response_format` takes under 1 s."""
MAX_COMPILATIONS = 2
"""At one time, so that a compilation that was given up on costs one core at most this many times."""
# llguidance recurses over chains of rules and references, up to 13 kB a level; only touched pages are real memory.
COMPILE_STACK_BYTES = 512 * 2**20

# A schema reaches llguidance inside a Lark text of ours, which its messages quote.
_SCHEMA_PREFIX = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: ")
_SOURCE_LINES = re.compile(r"\n +\d+ \| ")

T = TypeVar("T")


def _limits() -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(
        max_lexer_states=50_000,  # 1–2 kB each: under 100 MB for the worst request, instead of 500
        verbose_errors=False,  # the parser's state would put the user's schema into the log
    )


class GrammarCompiler:
    """Compiles response formats for one vocabulary. Thread-safe: request threads call it while the engine runs."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._tokens = token_bytes
        self._running = threading.BoundedSemaphore(MAX_COMPILATIONS)

    def compile(self, response_format: object) -> Grammar | None:
        """The grammar of an OpenAI-style `response_format` (see `response_format`); None for free text.

        Raises:
            InvalidParameterError: malformed, over a limit, or a language without any answer; the message says which.
            OverloadedError: too many compilations at once.
        """
        text = formats.to_grammar(response_format)
        return None if text is None else self.compile_lark(text)

    def compile_lark(self, text: str) -> Grammar:
        """The grammar of a text from `response_format.to_grammar` or `tools.call_grammar`.

        Raises:
            InvalidParameterError, OverloadedError: as `compile`.
        """
        if not self._running.acquire(timeout=COMPILE_SECONDS):
            raise OverloadedError("other requests' grammars are being compiled; try again later")
        matcher = _bounded(lambda: self._build(text), self._running.release)
        if matcher is None:
            raise InvalidParameterError(
                f"response_format took longer than {COMPILE_SECONDS:g} s to compile; simplify it"
            )
        if matcher.is_error():
            raise InvalidParameterError(f"response_format cannot be used: {_explain(matcher)}")
        return Grammar(self._tokens, matcher)

    def _build(self, text: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokens.llguidance, text, log_level=0, limits=_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # an empty language shows here first, and the first step finds a warm lexer
        return matcher


_STACK_SIZE = threading.Lock()


def _bounded(work: Callable[[], T], done: Callable[[], None]) -> T | None:
    """Run ``work`` on a thread with a deep stack; None if it is not back in time. ``done`` runs when it does end."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # a panic of the library is not an Exception
            failures.append(error)
        finally:
            done()

    thread = threading.Thread(target=run, name="grammar-compile", daemon=True)
    with _STACK_SIZE:
        before = threading.stack_size(COMPILE_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join(COMPILE_SECONDS)
    if failures:
        raise InternalError("a response_format could not be compiled") from failures[0]
    return results[0] if results else None


def _explain(matcher: llguidance.LLMatcher) -> str:
    message = _SOURCE_LINES.split(matcher.get_error(), maxsplit=1)[0].replace("<non-verbose/>", "").strip()
    message = _SCHEMA_PREFIX.sub("", message)
    if message == "NoExtensionBias":
        return "no answer can satisfy it"
    if message.startswith("Unimplemented keys"):
        return f'{message}; leave them out, or set "x-guidance": {{"lenient": true}} in the schema to have them ignored'
    return message[:500]


class Grammar:
    """A compiled response format. Thread-safe."""

    def __init__(self, token_bytes: TokenBytes, compiled: llguidance.LLMatcher) -> None:
        self._tokens = token_bytes
        self._compiled = compiled
        self._lock = threading.Lock()

    def matcher(self) -> Matcher:
        """A matcher at the start of an answer, for one sequence."""
        with self._lock:
            return Matcher(self._tokens, self._compiled.deep_copy())


class Matcher:
    """Where one sequence stands in its grammar. Used by one thread at a time.

    `accept` and `rollback` cost microseconds; `mask` 3 to 50 typically, some milliseconds when it first meets a new
    part of the grammar.
    """

    def __init__(self, token_bytes: TokenBytes, inner: llguidance.LLMatcher, accepted: int = 0) -> None:
        self._tokens = token_bytes
        self.inner = inner
        self._accepted = accepted  # without the end-of-sequence token, which llguidance does not count in every state
        self._ended = False

    @property
    def has_ended(self) -> bool:
        """An end-of-sequence token was accepted."""
        return self._ended

    @property
    def is_complete(self) -> bool:
        """The answer may end here."""
        return self._ended or bool(self.inner.is_accepting())

    @property
    def is_finished(self) -> bool:
        """The answer is complete and nothing but end-of-sequence can follow: the engine may stop without drawing it."""
        return self._ended or (bool(self.inner.is_stopped()) and not self.inner.is_error())

    def mask(self, out: NDArray[np.int32]) -> None:
        """Write the mask of the next token: bit ``i % 32`` of word ``i // 32`` is set where token i is allowed.

        Args:
            out: [ceil(V / 32)] int32, contiguous. Once finished, the end-of-sequence ids alone are allowed.

        Raises:
            InvalidParameterError: the grammar ran into a limit or a dead end (a rule that can never be completed).
        """
        address = self.check_rows(out, 1)
        if self._ended:
            self._tokens.write_eos_mask(out)
            return
        self.inner.unsafe_compute_mask_ptr(address, out.nbytes)
        self.raise_error()

    def check_rows(self, out: NDArray[np.int32], rows: int) -> int:
        """The address of ``out`` if it can take ``rows`` masks; llguidance writes there without looking."""
        words = self._tokens.mask_words
        if out.dtype != np.int32 or out.size != rows * words or not (out.flags.c_contiguous and out.flags.writeable):
            raise ValueError(f"masks go into a contiguous int32 array of {rows} × {words} words")
        return int(out.ctypes.data)

    def raise_error(self) -> None:
        """Raises InvalidParameterError where the grammar cannot go on."""
        if self.inner.is_error():
            raise InvalidParameterError(f"response_format cannot be followed further: {_explain(self.inner)}")

    def accept(self, token_id: int) -> None:
        """Step over a drawn token.

        Raises:
            InvalidParameterError: the grammar ran into a limit.
            InternalError: a token that the mask does not allow; the matcher is as it was.
        """
        self.raise_error()
        if self._ended:
            raise InternalError(f"token {token_id} comes after the end of the answer")
        if token_id in self._tokens.eos_token_ids:
            if not self.is_complete:
                raise InternalError("end of sequence before the answer is complete")
            self._ended = True
        elif self.inner.try_consume_tokens([token_id]):
            self._accepted += 1
        else:
            self.raise_error()
            raise InternalError(f"token {token_id} does not fit the grammar; was the mask applied?")

    def split_at_eos(self, draft: Sequence[int]) -> tuple[list[int], bool]:
        """The draft before its first end-of-sequence token, and whether it has one."""
        text: list[int] = []
        for token in draft:
            if token in self._tokens.eos_token_ids:
                return text, True
            text.append(token)
        return text, False

    def forced_bytes(self) -> bytes:
        """What every answer continues with from here, in UTF-8 (maybe nothing): a draft that costs no model."""
        return b"" if self.is_finished else bytes(self.inner.compute_ff_bytes())

    def rollback(self, count: int) -> None:
        """Take the last ``count`` accepted tokens back.

        Raises:
            ValueError: more than were accepted.
            InvalidParameterError: the grammar had run into a limit.
        """
        self.raise_error()
        if not 0 <= count <= self._accepted + self._ended:
            raise ValueError(f"{count} tokens cannot be taken back; {self._accepted + self._ended} were accepted")
        if count and self._ended:
            self._ended = False
            count -= 1
        if count:
            self._accepted -= count
            if not self.inner.rollback(count):
                self.raise_error()

    def fork(self) -> Matcher:
        """An independent matcher at the same place, for another sequence of the same request."""
        twin = Matcher(self._tokens, self.inner.deep_copy(), self._accepted)
        twin._ended = self._ended
        return twin
