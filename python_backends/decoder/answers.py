"""From drawn tokens to what the caller reads, on a thread of its own beside the next step.

Detokenizing, looking for stop strings and tool calls, and sending take as long as the caller's side takes; the engine
only hands tokens over. A stop string is therefore found while the next step may be running: the tokens of that step are
dropped here, and the engine frees the slot before the one after.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from python_backends.decoder.detokenizer import Detokenizer, StopStrings
from python_backends.decoder.sequence import ActiveSequence, Piece, PromptLogprobs, Request, TopLogprobs, Usage
from python_backends.decoder.tool_calls import ToolCall, ToolCallParser
from python_backends.errors import InternalError, WiCoreError

log = logging.getLogger("wicore")


@dataclass(frozen=True)
class Drawn:
    """Tokens of one sequence's step, in order."""

    sequence: ActiveSequence
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
    finish_reason: str = ""
    """Of the last token: stop (it ends the answer and has no text) or length; or why there are no more."""
    error: WiCoreError | None = None


@dataclass
class _Answer:
    """What one sequence has been given so far."""

    detokenizer: Detokenizer
    stops: StopStrings
    tools: ToolCallParser | None
    min_tokens: int
    completion_tokens: int = 0
    called: bool = False


class AnswerWriter:
    """Writes every answer; one thread, so each caller sees its pieces in order."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._answers: dict[int, _Answer] = {}
        self._inbox: queue.SimpleQueue[Drawn | ActiveSequence | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="wicore-answers", daemon=True)
        self._thread.start()

    def begin(self, sequence: ActiveSequence) -> None:
        """Before the first `write` of a sequence; sends the prompt where the request wants it echoed."""
        self._inbox.put(sequence)

    def write(self, drawn: Drawn) -> None:
        """Hand over; returns at once."""
        self._inbox.put(drawn)

    def close(self) -> None:
        """Write what was handed over and end the thread."""
        self._inbox.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (item := self._inbox.get()) is not None:
            try:
                if isinstance(item, Drawn):
                    self._write(item)
                else:
                    self._begin(item)
            except Exception:
                log.exception("an answer could not be written")
                self._give_up(item.sequence if isinstance(item, Drawn) else item)

    def _give_up(self, sequence: ActiveSequence) -> None:
        """Tell the caller and have the engine free the slot; what else is drawn is dropped."""
        self._answers.pop(sequence.sequence_id, None)
        sequence.cancelled = True
        error = InternalError("the answer could not be written; see the server's log")
        _send(sequence.request, Piece("", index=sequence.index, finish_reason="error", error=error))

    def _begin(self, sequence: ActiveSequence) -> None:
        request = sequence.request
        self._answers[sequence.sequence_id] = _Answer(
            Detokenizer(self._tokenizer),
            StopStrings(request.parameters.stop),
            ToolCallParser(request.tools) if request.tools else None,
            request.parameters.min_tokens,
        )
        if request.parameters.echo:
            text = self._tokenizer.decode(list(request.input_ids), skip_special_tokens=True)
            request.sink(Piece(text, index=sequence.index))

    def _write(self, drawn: Drawn) -> None:
        sequence = drawn.sequence
        answer = self._answers.get(sequence.sequence_id)
        if answer is None:  # it ended with a stop string while this step ran
            return
        text, used, found = self._text(answer, drawn)
        reason = "stop" if found else drawn.finish_reason
        if reason and not found:
            text += _rest(answer)
        calls: tuple[ToolCall, ...] = ()
        if answer.tools is not None:
            text, calls = _through_tools(answer, answer.tools, text, ended=bool(reason))
        answer.completion_tokens += used
        answer.called |= bool(calls)
        if reason:
            del self._answers[sequence.sequence_id]
            sequence.stopped = found
        piece = Piece(
            text,
            drawn.token_ids[:used],
            drawn.logprobs[:used],
            drawn.top_logprobs[:used],
            sequence.index,
            calls,
            drawn.prompt_logprobs,
            "tool_calls" if reason == "stop" and answer.called else reason,
            Usage(sequence.prompt_length, answer.completion_tokens, sequence.cached) if reason else None,
            drawn.error,
            sequence.begun_s if reason else None,
        )
        _send(sequence.request, piece)

    def _text(self, answer: _Answer, drawn: Drawn) -> tuple[str, int, bool]:
        """(text to give out, tokens it took, whether a stop string was found)."""
        text = ""
        last = len(drawn.token_ids) - 1
        for position, token in enumerate(drawn.token_ids):
            if position == last and drawn.finish_reason == "stop":
                break  # the token that ends an answer is counted but has no text
            piece = answer.detokenizer.add(token)
            if answer.completion_tokens + position < answer.min_tokens:
                text += piece  # a stop string that began here would end the answer too early
                continue
            safe, found = answer.stops.add(piece)
            text += safe
            if found:
                return text, position + 1, True
        return text, len(drawn.token_ids), False


def _rest(answer: _Answer) -> str:
    text, found = answer.stops.add(answer.detokenizer.finish())
    return text if found else text + answer.stops.finish()


def _through_tools(
    answer: _Answer, parser: ToolCallParser, text: str, *, ended: bool
) -> tuple[str, tuple[ToolCall, ...]]:
    parsed = [parser.add(text)] if text else []
    if ended:
        parsed.append(parser.finish())
    calls: Sequence[ToolCall] = [call for part in parsed for call in part.calls]
    # A call that the answer's end cut off is no call; its text is all there is of it.
    return "".join([*(part.text for part in parsed), parser.unfinished]), tuple(calls)


def _send(request: Request, piece: Piece) -> None:
    try:
        request.sink(piece)
    except Exception:
        log.exception("an answer could not be sent")
