"""The decode loop: schedule, run, postprocess, until closed.

One thread owns the runtime and every sequence. Other threads hand in requests and stops, watch callers and write
answers; they meet this one at a lock that is never held while a step runs.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

from python_backends.config import Config
from python_backends.decoder.adjustments import Adjustments
from python_backends.decoder.answers import AnswerWriter, Drawn
from python_backends.decoder.batch import make_inputs
from python_backends.decoder.budget import PrefillBudget
from python_backends.decoder.drafts import PromptLookup
from python_backends.decoder.masks import StepMasks
from python_backends.decoder.postprocess import Postprocessor
from python_backends.decoder.scheduler import Scheduler, Step
from python_backends.decoder.sequence import ActiveSequence, Request, seeds
from python_backends.decoder.stats import Stats
from python_backends.errors import (
    CancelledError,
    DeadlineExceededError,
    InternalError,
    OverloadedError,
    ServerUnavailableError,
    WiCoreError,
)
from python_backends.runtime.base import DecoderRuntime, StepOutputs

log = logging.getLogger("wicore")

IDLE_WAIT_S = 0.5
"""How often an idle engine looks at the deadlines of its queue."""
WATCH_S = 0.01
"""How often callers are asked whether they have gone."""
REMEMBER_STOP_S = 60.0
PROMPT_LOGPROBS_CHUNK = 64
"""Prompt tokens a step where their log-probabilities are wanted: each needs a row of logits."""


class Engine:
    """Answers requests with one runtime.

    Args:
        runtime: executes the steps; closed with the engine.
        tokenizer: of the same checkpoint.
        config: queue limits, chunk size, fairness, drafts.
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
        self.stats = Stats()
        self._runtime = runtime
        self._clock = clock
        self._config = config
        self._scheduler = Scheduler(
            self.spec.num_slots, config.max_queue, config.max_overtakes, config.quantum_tokens or None
        )
        self._budget = PrefillBudget(config.prefill_chunk, config.target_inter_token_ms / 1000)
        self._writer = AnswerWriter(tokenizer)
        self._masks = StepMasks(self.spec, config.max_draft)
        self._postprocessor = Postprocessor(runtime, self._writer, self._masks, self.stats, config.max_draft)
        self._sequences: dict[int, ActiveSequence] = {}
        self._forks: dict[int, list[ActiveSequence]] = {}
        """By the sequence that computes the shared beginning: those waiting for it."""
        self._stopped: dict[str, float] = {}
        """By request id, until when a stop holds for the next request of that id."""
        self._ids = itertools.count()
        self._changed = threading.Condition(threading.RLock())
        self._closing = False
        self._threads = [
            threading.Thread(target=self._loop, name="wicore-engine", daemon=True),
            threading.Thread(target=self._watch, name="wicore-watch", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request; its answers go to ``request.sink``.

        Raises:
            OverloadedError: the queue is full.
            ServerUnavailableError: the engine is closing.
            CancelledError: its id was stopped before it came.
            InvalidRequestError: the request does not fit the model (`Request.check`).
        """
        request.check(self.spec)
        sequences = [self._sequence(request, index, seed) for index, seed in enumerate(seeds(request.parameters))]
        with self._changed:
            if self._closing:
                raise ServerUnavailableError("the server is shutting down")
            if self._stopped.pop(request.request_id, 0.0) > self._clock():
                raise CancelledError("the request was stopped")
            if not self._scheduler.can_add(len(sequences)):
                raise OverloadedError(f"{len(self._scheduler.queued)} requests are waiting already; try again later")
            for sequence in sequences:
                self._sequences[sequence.sequence_id] = sequence
                self._writer.begin(sequence)
            self._queue(sequences)
            self._changed.notify_all()

    def stop(self, request_id: str) -> bool:
        """End the requests of that id before the next step; whether there was one.

        A request that is still on its way here (its images are being encoded) is ended when it arrives.
        """
        with self._changed:
            now = self._clock()
            self._stopped = {each: until for each, until in self._stopped.items() if until > now}
            found = [each for each in self._sequences.values() if each.request.request_id == request_id]
            for sequence in found:
                sequence.cancelled = True
            if request_id and not found:
                self._stopped[request_id] = now + REMEMBER_STOP_S
            self._changed.notify_all()
            return bool(found)

    def close(self) -> None:
        """End every request as cancelled, stop the threads and free the runtime."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._writer.close()
        self._masks.close()
        self._runtime.close()

    @property
    def idle(self) -> bool:
        """Whether no request is here and every slot is free."""
        with self._changed:
            return not self._sequences and not self._scheduler.running and not self._scheduler.waiting

    def snapshot(self) -> dict[str, object]:
        """What is here now, and totals since the start; JSON-ready."""
        with self._changed:
            now = {
                "running": len(self._scheduler.running),
                "decoding": self._scheduler.decoding,
                "waiting": len(self._scheduler.waiting),
                "sequences": len(self._sequences),
            }
        slots = {"slots": self.spec.num_slots, "max_context_length": self.spec.max_context_length}
        return {**now, **slots, "totals": self.stats.read(), "queue_times": self.stats.queue_times()}

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant does not hold."""
        with self._changed:
            self._scheduler.check_integrity()
            forked = {each.sequence_id for forks in self._forks.values() for each in forks}
            known = {*self._scheduler.waiting, *self._scheduler.running} | forked
            assert known == set(self._sequences), "the scheduler and the engine know different sequences"

    # --- one step ---------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while (step := self._schedule()) is not None:
            outputs = self._run(step)
            self._postprocess(step, outputs)

    def _schedule(self) -> Step | None:
        """Wait for work; None when closed."""
        with self._changed:
            while True:
                self._sweep()
                if self._closing:
                    return None
                step = self._scheduler.schedule(self._budget.tokens(self._scheduler.decoding))
                if step is not None:
                    self._count_waits(step)
                    return step
                self._changed.wait(IDLE_WAIT_S if self._sequences else None)

    def _count_waits(self, step: Step) -> None:
        """Note how long sequences that have their first step now were in the queue."""
        if step.kind == "prefill":
            for sequence in (self._sequences[row.sequence_id] for row in step.rows):
                if not sequence.begun:
                    sequence.begun = True
                    self.stats.waited(self._clock() - sequence.submitted_s)

    def _run(self, step: Step) -> StepOutputs | WiCoreError:
        try:
            for move in step.set_aside:
                self._sequences[move.sequence_id].state = self._runtime.export_slot(move.slot, move.length)
            for move in step.resume:
                sequence = self._sequences[move.sequence_id]
                assert sequence.state is not None
                self._runtime.import_slot(move.slot, sequence.state)
                sequence.state = None
            masks = self._masks.collect(step, self._sequences)
            inputs = make_inputs(step, self._sequences, self.spec, masks)
            start = time.perf_counter()
            outputs = self._runtime.step(inputs)
            seconds = time.perf_counter() - start
        except WiCoreError as error:
            log.exception("a step failed")
            return error
        except Exception:
            log.exception("a step failed")
            return InternalError("a decode step failed; see the server's log")
        self.stats.moved(len(step.set_aside) + len(step.resume))
        self._observe(step, inputs.input_ids.shape, seconds)
        return outputs

    def _postprocess(self, step: Step, outputs: StepOutputs | WiCoreError) -> None:
        if isinstance(outputs, WiCoreError):
            involved = {row.sequence_id for row in step.rows}
            involved |= {move.sequence_id for move in (*step.set_aside, *step.resume)}
            with self._changed:
                for sequence_id in involved:
                    self._end(self._sequences[sequence_id], "error", outputs)
            return
        for row, drawn, ended in self._postprocessor.accept(step, outputs, self._sequences):
            with self._changed:
                self._scheduler.computed(row, drawn)
                if ended:
                    self._remove(self._sequences[row.sequence_id])
        for row in step.rows:
            self._share(row.sequence_id, row.slot, row.start + row.count)

    def _observe(self, step: Step, shape: tuple[int, ...], seconds: float) -> None:
        rows, width = shape
        useful = sum(row.count for row in step.rows)
        self.stats.observe(step.kind, useful, rows * width, seconds)
        if step.kind == "prefill":
            self._budget.observe_prefill(useful, seconds)
        else:
            self._budget.observe_decode(seconds)
            self._postprocessor.cost.observe(rows, width, seconds)

    # --- sequences --------------------------------------------------------------------------------------------

    def _sequence(self, request: Request, index: int, seed: int) -> ActiveSequence:
        parameters = request.parameters
        now = self._clock()
        banned = (*self.spec.eos_token_ids, *parameters.stop_token_ids) if parameters.min_tokens else ()
        adjusts = bool(parameters.logit_bias or banned) or not parameters.penalties.neutral
        bias = dict(parameters.logit_bias)
        adjustments = Adjustments(parameters.penalties, bias, request.input_ids, banned) if adjusts else None
        # Penalties count what a draft would still have to draw, so they and drafts exclude each other.
        drafts = self._config.max_draft and parameters.penalties.neutral and not banned
        return ActiveSequence(
            sequence_id=next(self._ids),
            request=request,
            index=index,
            max_tokens=min(parameters.max_tokens, self.spec.max_context_length - len(request.input_ids)),
            queue_deadline_s=now + parameters.queue_timeout_ms / 1000,
            deadline_s=now + parameters.deadline_ms / 1000,
            tokens=list(request.input_ids),
            seed=seed,
            submitted_s=now,
            adjustments=adjustments,
            matcher=request.grammar.matcher() if request.grammar else None,
            lookup=PromptLookup(request.input_ids) if drafts else None,
        )

    def _queue(self, sequences: list[ActiveSequence]) -> None:
        """Queue the answers of one request: all at once, or the first, and the others when the prompt is computed."""
        first, *others = sequences
        size = self.spec.tokens_per_image
        shared = first.prompt_length - 1
        splits_image = any(start < shared < start + size for start in first.request.image_starts)
        if others and shared and not splits_image:
            self._forks[first.sequence_id] = others
            self._add(first, boundaries=(shared,))
        else:
            for sequence in sequences:
                self._add(sequence)

    def _add(self, sequence: ActiveSequence, boundaries: Sequence[int] = (), computed: int = 0) -> None:
        parameters, size = sequence.request.parameters, self.spec.tokens_per_image
        limits = {} if parameters.prompt_logprobs is None else {"largest_chunk": PROMPT_LOGPROBS_CHUNK}
        self._scheduler.add(
            sequence.sequence_id,
            sequence.prompt_length,
            [(start, start + size) for start in sequence.request.image_starts],
            priority=parameters.priority,
            size=sequence.prompt_length + sequence.max_tokens,
            boundaries=boundaries,
            computed=computed,
            **limits,
        )

    def _share(self, sequence_id: int, slot: int, computed: int) -> None:
        """Where a shared beginning is computed, queue the sequences that wait for it."""
        sequence = self._sequences.get(sequence_id)
        if sequence_id not in self._forks or sequence is None or computed != sequence.prompt_length - 1:
            return
        state = self._runtime.export_slot(slot, computed)
        with self._changed:
            for fork in self._forks.pop(sequence_id):
                fork.state = state
                self._add(fork, computed=computed)

    def _sweep(self) -> None:
        """End what was stopped, cancelled, or is past its time. Called with the lock held, between steps."""
        now = self._clock()
        queued = set(self._scheduler.queued)
        for sequence in list(self._sequences.values()):
            if sequence.stopped:
                self._remove(sequence)
            elif self._closing or sequence.cancelled:
                self._end(sequence, "cancelled", CancelledError("the request was stopped"))
            elif now >= sequence.deadline_s:
                self._end(sequence, "deadline", DeadlineExceededError("the request's deadline passed"))
            elif sequence.sequence_id in queued and now >= sequence.queue_deadline_s:
                self._end(sequence, "deadline", DeadlineExceededError("no slot became free within the queue timeout"))

    def _end(self, sequence: ActiveSequence, reason: str, error: WiCoreError) -> None:
        """Free the slot first, then tell the caller: who hears the end may count on the slot."""
        self._remove(sequence)
        self._writer.write(Drawn(sequence, (), (), finish_reason=reason, error=error))

    def _remove(self, sequence: ActiveSequence) -> None:
        del self._sequences[sequence.sequence_id]
        self._masks.forget(sequence.sequence_id)
        waiting = next((forks for forks in self._forks.values() if sequence in forks), None)
        if waiting is not None:
            waiting.remove(sequence)
            return
        self._scheduler.remove(sequence.sequence_id)
        for fork in self._forks.pop(sequence.sequence_id, ()):  # nobody computes the beginning for them now
            self._add(fork)

    def _watch(self) -> None:
        """Ask callers whether they have gone, beside the steps: the answer can take a while."""
        while not self._closing:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._sequences)
                sequences = list(self._sequences.values())
            for sequence in sequences:
                if not sequence.cancelled and sequence.request.is_cancelled():
                    with self._changed:
                        sequence.cancelled = True
                        self._changed.notify_all()
            time.sleep(WATCH_S)
