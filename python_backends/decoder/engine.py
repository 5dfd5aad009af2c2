"""The decode loop: schedule, run, postprocess, until closed.

One thread owns the runtime and every sequence; other threads only hand in requests and stops through a locked inbox.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer

from python_backends.config import Config
from python_backends.decoder.detokenizer import Detokenizer, StopStrings
from python_backends.decoder.scheduler import Row, Scheduler, Step
from python_backends.decoder.sequence import ActiveSequence, Piece, Request
from python_backends.errors import (
    CancelledError,
    DeadlineExceededError,
    InternalError,
    OverloadedError,
    ServerUnavailableError,
    WiCoreError,
)
from python_backends.runtime.base import DecoderRuntime, StepInputs, StepOutputs

log = logging.getLogger("wicore")

IDLE_WAIT_S = 0.5
"""How often an idle engine looks at the deadlines and cancellations of its queue."""


class Engine:
    """Answers requests with one runtime.

    Args:
        runtime: executes the steps; closed with the engine.
        tokenizer: of the same checkpoint.
        config: queue limits and chunk size.
        clock: seconds, monotonic; a test may give its own.
    """

    def __init__(
        self,
        runtime: DecoderRuntime,
        tokenizer: Tokenizer,
        config: Config,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = runtime.spec
        self._runtime = runtime
        self._tokenizer = tokenizer
        self._clock = clock
        self._prefill_chunk = config.prefill_chunk
        self._scheduler = Scheduler(self.spec.num_slots, config.max_queue)
        self._sequences: dict[int, ActiveSequence] = {}
        self._ids = itertools.count()
        self._changed = threading.Condition(threading.RLock())
        self._stopped: set[str] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="wicore-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request; its answer goes to ``request.sink``.

        Raises:
            OverloadedError: the queue is full.
            ServerUnavailableError: the engine is closing.
            InvalidRequestError: the request does not fit the model (`Request.check`).
        """
        request.check(self.spec)
        parameters = request.parameters
        now = self._clock()
        sequence = ActiveSequence(
            sequence_id=next(self._ids),
            request=request,
            detokenizer=Detokenizer(self._tokenizer),
            stops=StopStrings(parameters.stop),
            max_tokens=min(parameters.max_tokens, self.spec.max_context_length - len(request.input_ids)),
            queue_deadline_s=now + parameters.queue_timeout_ms / 1000,
            deadline_s=now + parameters.deadline_ms / 1000,
            tokens=list(request.input_ids),
        )
        spans = [(start, start + self.spec.tokens_per_image) for start in request.image_starts]
        with self._changed:
            if self._closing:
                raise ServerUnavailableError("the server is shutting down")
            if not self._scheduler.can_add():
                raise OverloadedError(f"{len(self._scheduler.waiting)} requests are waiting already; try again later")
            if parameters.echo:
                request.sink(Piece(self._tokenizer.decode(list(request.input_ids), skip_special_tokens=True)))
            size = len(request.input_ids) + sequence.max_tokens
            self._scheduler.add(sequence.sequence_id, len(request.input_ids), spans, size=size)
            self._sequences[sequence.sequence_id] = sequence
            self._changed.notify()

    def stop(self, request_id: str) -> bool:
        """End the requests of that id before the next step; whether there was one."""
        with self._changed:
            found = any(sequence.request.request_id == request_id for sequence in self._sequences.values())
            if found:
                self._stopped.add(request_id)
                self._changed.notify()
            return found

    def close(self) -> None:
        """End every request as cancelled, stop the thread and free the runtime."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._runtime.close()

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant does not hold."""
        with self._changed:
            self._scheduler.check_integrity()
            known = {*self._scheduler.waiting, *self._scheduler.running}
            assert known == set(self._sequences), "the scheduler and the engine know different sequences"

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._sweep()
                if self._closing:
                    return
                step = self._scheduler.schedule(self._prefill_chunk)
                if step is None:
                    self._changed.wait(IDLE_WAIT_S if self._sequences else None)
                    continue
            try:
                outputs = self._run(step)
            except Exception as error:
                self._fail(step, error)
                continue
            self._postprocess(step, outputs)

    def _run(self, step: Step) -> StepOutputs:
        first = step.rows[0].slot
        rows = {row.slot - first: row for row in step.rows}
        size = step.rows[-1].slot - first + 1
        width = max(row.count for row in step.rows)
        inputs = _empty_inputs(first, size, width)
        for index, row in rows.items():
            sequence = self._sequences[row.sequence_id]
            chunk = sequence.tokens[row.start : row.start + row.count]
            inputs.input_ids[index, : row.count] = chunk
            inputs.past_len[index] = row.start
            inputs.query_len[index] = row.count
            inputs.logit_positions[index, 0] = max(0, row.count - 1)
            self._fill_sampling(inputs, index, row, sequence)
            self._fill_images(inputs, index, row, sequence)
        return self._runtime.step(inputs)

    def _fill_sampling(self, inputs: StepInputs, index: int, row: Row, sequence: ActiveSequence) -> None:
        parameters = sequence.request.parameters
        if not row.samples or parameters.temperature == 0:
            return
        inputs.temperature[index] = parameters.temperature
        inputs.top_k[index] = max(0, min(parameters.top_k, self.spec.vocab_size))
        inputs.top_p[index] = parameters.top_p
        inputs.min_p[index] = parameters.min_p
        # Keyed by seed and position alone, so the draw does not depend on what shares the batch.
        generator = np.random.Generator(np.random.Philox(key=sequence.seed, counter=row.start + row.count))
        inputs.uniform[index, 0] = generator.random()

    def _fill_images(self, inputs: StepInputs, index: int, row: Row, sequence: ActiveSequence) -> None:
        request = sequence.request
        size = self.spec.tokens_per_image
        end = row.start + row.count
        inside = [number for number, start in enumerate(request.image_starts) if row.start <= start < end]
        if not inside:
            return
        assert request.image_features is not None
        inputs.image_features = request.image_features[inside[0] * size : (inside[-1] + 1) * size]
        inputs.image_index = np.full_like(inputs.input_ids, -1)
        inputs.image_group = np.full_like(inputs.input_ids, -1)
        for order, number in enumerate(inside):
            start = request.image_starts[number] - row.start
            inputs.image_index[index, start : start + size] = np.arange(order * size, (order + 1) * size)
            inputs.image_group[index, start : start + size] = order

    def _postprocess(self, step: Step, outputs: StepOutputs) -> None:
        first = step.rows[0].slot
        with self._changed:
            for row in step.rows:
                self._scheduler.computed(row)
        for row in step.rows:
            if row.samples:
                index = row.slot - first
                self._accept(row, int(outputs.next_token[index, 0]), float(outputs.logprob[index, 0]))

    def _accept(self, row: Row, token: int, logprob: float) -> None:
        sequence = self._sequences[row.sequence_id]
        parameters = sequence.request.parameters
        sequence.tokens.append(token)
        is_eos = token in self.spec.eos_token_ids and not parameters.ignore_eos
        ended = is_eos or token in parameters.stop_token_ids
        # The token that ends an answer is counted but has no text.
        text, stopped = ("", False) if ended else sequence.stops.add(sequence.detokenizer.add(token))
        finished = ended or stopped
        reason = "stop" if finished else ""
        if not finished and sequence.usage.completion_tokens >= sequence.max_tokens:
            reason = "length"
        if reason and not stopped:
            text += self._rest(sequence)
        piece = Piece(text, (token,), (logprob,), reason, sequence.usage if reason else None)
        if reason:
            self._finish(sequence, piece)
        else:
            self._send(sequence, piece)

    def _rest(self, sequence: ActiveSequence) -> str:
        text, stopped = sequence.stops.add(sequence.detokenizer.finish())
        return text if stopped else text + sequence.stops.finish()

    def _sweep(self) -> None:
        """End what was stopped, cancelled, or is past its time. Called with the lock held, between steps."""
        now = self._clock()
        queued = set(self._scheduler.queued)
        for sequence in list(self._sequences.values()):
            request = sequence.request
            if self._closing or request.request_id in self._stopped or request.is_cancelled():
                self._end(sequence, "cancelled", CancelledError("the request was stopped"))
            elif now >= sequence.deadline_s:
                self._end(sequence, "deadline", DeadlineExceededError("the request's deadline passed"))
            elif sequence.sequence_id in queued and now >= sequence.queue_deadline_s:
                self._end(sequence, "deadline", DeadlineExceededError("no slot became free within the queue timeout"))
        self._stopped.clear()

    def _fail(self, step: Step, error: Exception) -> None:
        log.error("a step failed", exc_info=error)
        ours = (
            error if isinstance(error, WiCoreError) else InternalError("the decode step failed; see the server's log")
        )
        for row in step.rows:
            self._end(self._sequences[row.sequence_id], "error", ours)

    def _end(self, sequence: ActiveSequence, reason: str, error: WiCoreError) -> None:
        self._finish(sequence, Piece(self._rest(sequence), (), (), reason, sequence.usage, error))

    def _finish(self, sequence: ActiveSequence, piece: Piece) -> None:
        """Free the slot first, then tell the client: who hears the end may count on the slot."""
        with self._changed:
            self._scheduler.remove(sequence.sequence_id)
            del self._sequences[sequence.sequence_id]
        self._send(sequence, piece)

    def _send(self, sequence: ActiveSequence, piece: Piece) -> None:
        try:
            sequence.request.sink(piece)
        except Exception:
            log.exception("an answer could not be sent")


def _empty_inputs(first_slot: int, size: int, width: int) -> StepInputs:
    """Greedy and idle in every row."""
    return StepInputs(
        first_slot=first_slot,
        input_ids=np.zeros((size, width), np.int32),
        past_len=np.zeros(size, np.int32),
        query_len=np.zeros(size, np.int32),
        logit_positions=np.zeros((size, 1), np.int32),
        temperature=np.zeros(size, np.float32),
        top_k=np.zeros(size, np.int32),
        top_p=np.ones(size, np.float32),
        min_p=np.zeros(size, np.float32),
        uniform=np.full((size, 1), 0.5, np.float32),
    )
