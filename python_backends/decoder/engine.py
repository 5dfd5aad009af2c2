"""The decode loop: schedule, run, postprocess, until closed.

One thread owns the runtime and every sequence. Other threads hand in requests and stops, watch callers and write
answers; they meet this one at a lock that is never held while a step runs.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable

from tokenizers import Tokenizer

from python_backends.config import Config
from python_backends.decoder.answers import AnswerWriter, Drawn
from python_backends.decoder.batch import make_inputs
from python_backends.decoder.budget import PrefillBudget
from python_backends.decoder.intake import Intake
from python_backends.decoder.masks import StepMasks
from python_backends.decoder.postprocess import Postprocessor
from python_backends.decoder.reuse import Reuse
from python_backends.decoder.scheduler import UNLIMITED, Row, Scheduler, Step
from python_backends.decoder.sequence import ActiveSequence, Request, make_sequence, seeds
from python_backends.decoder.stats import Stats
from python_backends.errors import (
    CancelledError,
    DeadlineExceededError,
    InternalError,
    InvalidParameterError,
    OverloadedError,
    ServerUnavailableError,
    WiCoreError,
)
from python_backends.kv.cache import KvCache
from python_backends.kv.hit import Hit
from python_backends.runtime.base import DecoderRuntime, StepInputs, StepOutputs

log = logging.getLogger("wicore")

IDLE_WAIT_S = 0.5
"""How often an idle engine looks at the deadlines of its queue."""
WATCH_S = 0.01
"""How often callers are asked whether they have gone, or twice a step where steps are long: it costs a message each."""
REMEMBER_STOP_S = 60.0


class Engine:
    """Answers requests with one runtime.

    Args:
        runtime: executes the steps; closed with the engine.
        tokenizer: of the same checkpoint.
        config: queue limits, chunk size, fairness, drafts.
        clock: seconds, monotonic; a test may give its own.
        cache: keeps KV beyond the requests that computed it; closed with the engine. None: every prompt is computed.
        on_failure: called once every request has been told, where a fault of the engine's own ended its loop.
        max_aside: computed tokens that sequences set aside may have together.
    """

    def __init__(
        self,
        runtime: DecoderRuntime,
        tokenizer: Tokenizer,
        config: Config,
        clock: Callable[[], float] = time.monotonic,
        cache: KvCache | None = None,
        on_failure: Callable[[], None] = lambda: None,
        max_aside: int = UNLIMITED,
    ) -> None:
        self.spec = runtime.spec
        self.stats = Stats()
        self._runtime = runtime
        self._clock = clock
        self._on_failure = on_failure
        self._config = config
        self._scheduler = Scheduler(
            self.spec.num_slots, config.max_queue, config.max_overtakes, config.quantum_tokens or None, max_aside
        )
        self._budget = PrefillBudget(config.prefill_chunk, config.target_inter_token_ms / 1000)
        self.cache = cache
        watches = config.hmt_attention_weight > 0
        self._reuse = Reuse(
            cache, runtime, lambda: self._budget.token_s, lambda: self._scheduler.idle, watches_attention=watches
        )
        self._writer = AnswerWriter(tokenizer)
        self._masks = StepMasks(self.spec, config.max_draft)
        self._postprocessor = Postprocessor(runtime, self._writer, self._masks, self.stats, config.max_draft)
        self._sequences: dict[int, ActiveSequence] = {}
        self._stopped: dict[str, float] = {}
        """By request id, until when a stop holds for the next request of that id."""
        self._ids = itertools.count()
        self._changed = threading.Condition(threading.RLock())
        self._intake = Intake(self._scheduler, self._reuse, runtime, self._sequences, self._changed)
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
            InvalidRequestError: the request does not fit the model (`Request.check`), or more answers than can wait.
        """
        request.check(self.spec)
        most = self.spec.num_slots + self._config.max_queue
        if request.parameters.n > most:
            raise InvalidParameterError(f"n is {request.parameters.n}; this server has room for {most} answers at once")
        hit = request.hit or self._reuse.look_up(request)
        try:
            self._submit(request, hit)
        except WiCoreError:
            if hit is not None:
                hit.release()
            raise

    def look_up(self, request: Request) -> Hit | None:
        """What the KV cache holds of a prompt whose images are not encoded yet; None without a cache.

        Give it to `submit` in ``request.hit``, or release it.
        """
        return self._reuse.look_up(request)

    def _submit(self, request: Request, hit: Hit | None) -> None:
        sequences = [
            make_sequence(
                request,
                next(self._ids),
                index,
                seed,
                spec=self.spec,
                max_draft=self._config.max_draft,
                now=self._clock() if request.arrived_s is None else request.arrived_s,
            )
            for index, seed in enumerate(seeds(request.parameters))
        ]
        with self._changed:
            if self._closing:
                raise ServerUnavailableError("the server is shutting down")
            if self._stopped.pop(request.request_id, 0.0) > self._clock():
                raise CancelledError("the request was stopped")
            if not self._scheduler.can_add(len(sequences) + self._intake.num_waiting):
                raise OverloadedError(f"{len(self._scheduler.queued)} requests are waiting already; try again later")
            for sequence in sequences:
                self._sequences[sequence.sequence_id] = sequence
                self._writer.begin(sequence)
            self._intake.queue(sequences, hit)
            self._changed.notify_all()

    def stop(self, request_id: str) -> bool:
        """End the requests of that id before the next step; whether there was one.

        A request that is still on its way here (its images are being encoded) is ended when it arrives. Requests
        without an id are nobody's to stop.
        """
        if not request_id:
            return False
        with self._changed:
            now = self._clock()
            self._stopped = {each: until for each, until in self._stopped.items() if until > now}
            found = [each for each in self._sequences.values() if each.request.request_id == request_id]
            for sequence in found:
                sequence.cancelled = True
            if not found:
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
        self._intake.close()
        self._writer.close()
        self._masks.close()
        if self.cache is not None:
            self.cache.close()
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
        found = {**now, **slots, "totals": self.stats.read(), "queue_times": self.stats.queue_times()}
        return found if self.cache is None else {**found, "kv_cache": self.cache.stats()}

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant does not hold."""
        with self._changed:
            self._scheduler.check_integrity()
            known = {*self._scheduler.waiting, *self._scheduler.running, *self._intake.waiting}
            assert known == set(self._sequences), "the scheduler and the engine know different sequences"

    # --- one step ---------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while (step := self._schedule()) is not None:
                outputs = self._run(step)
                if outputs is not None:
                    self._postprocess(step, outputs)
        except Exception:
            log.exception("the engine failed")
            self._fail()

    def _fail(self) -> None:
        """After a fault of our own nothing here can be trusted: tell every caller, take no more."""
        with self._changed:
            self._closing = True
            for sequence in self._sequences.values():
                error = InternalError("the decode engine failed; see the server's log")
                self._writer.write(Drawn(sequence, (), (), finish_reason="error", error=error))
            self._sequences.clear()
            self._changed.notify_all()
        self._writer.close()
        self._on_failure()

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
                self._budget.pause()
                self._changed.wait(IDLE_WAIT_S if self._sequences else None)

    def _count_waits(self, step: Step) -> None:
        """Note how long sequences that have their first step now were in the queue."""
        if step.kind == "prefill":
            for sequence in (self._sequences[row.sequence_id] for row in step.rows):
                if sequence.begun_s is None:
                    sequence.begun_s = self._clock()
                    self.stats.waited(sequence.begun_s - sequence.submitted_s)

    def _run(self, step: Step) -> StepOutputs | WiCoreError | None:
        """None where the step cannot run: what it needs is on its way into a slot, or lost and computed again."""
        try:
            if not self._move(step):
                return None
            self._postprocessor.shorten_drafts(step, self._sequences)
            masks = self._masks.collect(step, self._sequences)
            inputs = make_inputs(step, self._sequences, self.spec, masks, self._runtime.max_draft)
            if self._observed(step):
                inputs.attention_block = self._reuse.block_tokens
            start = time.perf_counter()
            self._budget.begin_step(start)
            outputs = self._runtime.step(inputs)
            seconds = time.perf_counter() - start
            self._budget.end_step(start + seconds)
        except Exception as error:
            log.exception("a step failed")
            failure = InternalError("a decode step failed; see the server's log")
            return error if isinstance(error, WiCoreError) else failure
        self._observe(step, inputs, seconds)
        return outputs

    def _move(self, step: Step) -> bool:
        """Take sequences out of slots and put them in; whether the step can run."""
        entering = {move.sequence_id for move in step.resume}
        for move in step.set_aside:
            sequence = self._sequences[move.sequence_id]
            sequence.state = self._runtime.export_slot(move.slot, move.length)
            if move.sequence_id not in entering:  # otherwise it only changes its slot
                self._reuse.pause(sequence, move.slot, move.length)
        absent = set()
        for move in step.resume:
            sequence = self._sequences[move.sequence_id]
            if sequence.state is not None:
                self._runtime.import_slot(move.slot, sequence.state)
                sequence.state = None
            elif not self._intake.load(sequence, move.slot, move.length):
                absent.add(move.sequence_id)
        self.stats.moved(len(step.set_aside) + len(step.resume))
        return not any(row.sequence_id in absent for row in step.rows)

    def _observed(self, step: Step) -> list[Row]:
        """Rows whose attention the cache wants to see."""
        pairs = [(row, self._sequences[row.sequence_id]) for row in step.rows if row.samples]
        wants = self._reuse.wants_masses
        return [row for row, each in pairs if wants(each, ends_prompt=row.start < each.prompt_length)]

    def _postprocess(self, step: Step, outputs: StepOutputs | WiCoreError) -> None:
        if isinstance(outputs, WiCoreError):
            involved = {row.sequence_id for row in step.rows}
            involved |= {move.sequence_id for move in (*step.set_aside, *step.resume)}
            with self._changed:
                for sequence_id in involved:
                    self._end(self._sequences[sequence_id], "error", outputs, keep=False)
            return
        observed = self._observed(step) if outputs.block_attention is not None else []
        for row, drawn, end in self._postprocessor.accept(step, outputs, self._sequences):
            sequence = self._sequences[row.sequence_id]
            with self._changed:
                self._scheduler.computed(row, drawn)
            length = len(sequence.tokens) - 1 if row.samples else row.start + row.count
            self._reuse.computed(sequence, row.slot, length)
            if row in observed and outputs.block_attention is not None:
                self._reuse.observe(sequence, outputs.block_attention[row.slot - step.rows[0].slot])
            self._intake.meet(sequence, row.slot, length)
            if end is not None:
                with self._changed:
                    self._remove(sequence)
                self._writer.write(end)
        for row in step.rows:
            self._intake.share(row.sequence_id, row.slot, row.start + row.count)

    def _observe(self, step: Step, inputs: StepInputs, seconds: float) -> None:
        rows, width = inputs.input_ids.shape
        useful = sum(row.count for row in step.rows)
        self.stats.observe(step.kind, useful, rows * width, seconds)
        if step.kind == "prefill":
            self._budget.observe_prefill(useful, seconds)
        else:
            self._budget.observe_decode(seconds)
            self._postprocessor.cost.observe(rows, inputs.logit_positions.shape[1], seconds)

    # --- sequences --------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """End what was stopped, cancelled, or is past its time. Called with the lock held, between steps."""
        now = self._clock()
        queued = set(self._scheduler.queued)
        for sequence in list(self._sequences.values()):
            if sequence.stopped:
                self._remove(sequence)
            elif sequence.failure is not None:
                self._end(sequence, "error", sequence.failure)
            elif self._closing or sequence.cancelled:
                self._end(sequence, "cancelled", CancelledError("the request was stopped"))
            elif now >= sequence.deadline_s:
                self._end(sequence, "deadline", DeadlineExceededError("the request's deadline passed"))
            elif sequence.sequence_id in queued and now >= sequence.queue_deadline_s:
                self._end(sequence, "deadline", DeadlineExceededError("no slot became free within the queue timeout"))

    def _end(self, sequence: ActiveSequence, reason: str, error: WiCoreError, *, keep: bool = True) -> None:
        """Free the slot first, then tell the caller: who hears the end may count on the slot."""
        self._remove(sequence, keep=keep)
        self._writer.write(Drawn(sequence, (), (), finish_reason=reason, error=error))

    def _remove(self, sequence: ActiveSequence, *, keep: bool = True) -> None:
        """Forget a sequence; with ``keep`` what it computed stays in the cache."""
        place = self._scheduler.place(sequence.sequence_id)
        if keep and place is not None:
            self._reuse.pause(sequence, *place)
        self._reuse.give_up(sequence)
        del self._sequences[sequence.sequence_id]
        self._masks.forget(sequence.sequence_id)
        self._intake.remove(sequence)

    def _watch(self) -> None:
        """Ask callers whether they have gone, beside the steps: the answer can take a while."""
        while not self._closing:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._sequences)
                sequences = list(self._sequences.values())
            for sequence in sequences:
                if not sequence.cancelled and _has_gone(sequence):
                    with self._changed:
                        sequence.cancelled = True
                        self._changed.notify_all()
            time.sleep(max(WATCH_S, self._budget.decode_s / 2))


def _has_gone(sequence: ActiveSequence) -> bool:
    """Whether the caller says so; one who cannot be asked has gone."""
    try:
        return sequence.request.is_cancelled()
    except Exception:
        log.exception("a caller could not be asked whether it has gone")
        return True
