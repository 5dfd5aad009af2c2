"""A request's answers as spans: how long each waited, had its prompt computed, and was decoded."""

from __future__ import annotations

import time
from collections.abc import Callable

from python_backends.decoder.sequence import Piece
from python_backends.tracing import Tracing


class AnswerTrace:
    """Stands before a request's sink and looks at what passes.

    Args:
        tracing: of the process.
        parent: the request's ``traceparent``.
        arrived_s: when the request came, in seconds of `time.monotonic`.
        sink: where the pieces go.
    """

    def __init__(self, tracing: Tracing, parent: str, arrived_s: float, sink: Callable[[Piece], None]) -> None:
        self._tracing = tracing
        self._parent = parent
        self._arrived_s = arrived_s
        self._sink = sink
        self._first_s: dict[int, float] = {}

    def __call__(self, piece: Piece) -> None:
        """Pass a piece on."""
        now = time.monotonic()
        if piece.token_ids:
            self._first_s.setdefault(piece.index, now)
        self._sink(piece)
        if piece.finish_reason:
            self._record(piece, now)

    def _record(self, last: Piece, now: float) -> None:
        """``queue`` until the first step, ``prefill`` until the first token, ``decode`` until the end."""
        usage = last.usage
        cached = {} if usage is None else usage.cached.by_tier
        whole = self._tracing.begin(
            "decoder",
            self._parent,
            start_s=self._arrived_s,
            wicore__answer=last.index,
            gen_ai__response__finish_reasons=[last.finish_reason],
            gen_ai__usage__input_tokens=None if usage is None else usage.prompt_tokens,
            gen_ai__usage__output_tokens=None if usage is None else usage.completion_tokens,
        )
        whole.set(**{f"wicore__cached_tokens__{tier}": tokens for tier, tokens in cached.items()})
        if last.error is not None:
            whole.fail(last.error)
        first = self._first_s.get(last.index)
        ends = {"queue": last.begun_s, "prefill": first, "decode": now if first is not None else None}
        begin = self._arrived_s
        for name, end in ends.items():
            if end is None:  # it ended before that: the part it was in lasted until now
                self._tracing.begin(name, whole.traceparent, start_s=begin).end(now)
                break
            self._tracing.begin(name, whole.traceparent, start_s=begin).end(end)
            begin = end
        whole.end(now)
