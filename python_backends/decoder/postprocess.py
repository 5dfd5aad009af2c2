"""What a step's outputs mean for its sequences: tokens kept, ends reached, the next draft, the next mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from python_backends.decoder.answers import AnswerWriter, Drawn
from python_backends.decoder.drafts import StepCost, worthwhile_length
from python_backends.decoder.masks import StepMasks
from python_backends.decoder.scheduler import Row, Step
from python_backends.decoder.sequence import ActiveSequence, PromptLogprobs, TopLogprobs
from python_backends.decoder.stats import Stats
from python_backends.runtime.base import DecoderRuntime, StepOutputs


class Postprocessor:
    """Ids only: what becomes text is handed to the answer writer.

    Args:
        runtime: asked how far a draft may reach.
        writer: of the answers.
        masks: told what was drawn.
        stats: counts.
        max_draft: draft tokens per row.
    """

    def __init__(
        self, runtime: DecoderRuntime, writer: AnswerWriter, masks: StepMasks, stats: Stats, max_draft: int
    ) -> None:
        self.cost = StepCost()
        self._runtime = runtime
        self._spec = runtime.spec
        self._writer = writer
        self._masks = masks
        self._stats = stats
        self._max_draft = max_draft

    def shorten_drafts(self, step: Step, sequences: Mapping[int, ActiveSequence]) -> None:
        """Before a decode step: cut its rows' drafts to the width that pays for all rows together."""
        drawing = [sequences[row.sequence_id] for row in step.rows if row.samples]
        drafts = [(len(each.draft), each.gain.rate) for each in drawing if each.draft]
        if not drafts:
            return
        slots = step.rows[-1].slot - step.rows[0].slot + 1
        longest = 0  # a plain step comes first, or there would be nothing to compare with
        if self.cost.knows_plain(slots):
            longest = worthwhile_length(drafts, len(drawing), lambda width: self.cost.ratio(slots, width))
        for sequence in drawing:
            del sequence.draft[longest:]

    def accept(
        self, step: Step, outputs: StepOutputs, sequences: Mapping[int, ActiveSequence]
    ) -> Iterator[tuple[Row, int, Drawn | None]]:
        """For every row: (row, tokens drawn, the answer's end, which the caller writes once the slot is free)."""
        rows = step.rows[-1].slot - step.rows[0].slot + 1
        going: list[tuple[ActiveSequence, tuple[int, ...]]] = []
        results: list[tuple[Row, int, Drawn | None]] = []
        for row in step.rows:
            sequence = sequences[row.sequence_id]
            index = row.slot - step.rows[0].slot
            if not row.samples:
                self._keep_prompt(sequence, row, outputs, index, row.count)
                results.append((row, 0, None))
                continue
            drawn, end = self._draw(sequence, row, outputs, index, rows)
            results.append((row, len(drawn), end))
            if end is None:
                going.append((sequence, drawn))
        self._masks.submit(going)
        yield from results

    def _draw(
        self, sequence: ActiveSequence, row: Row, outputs: StepOutputs, index: int, rows: int
    ) -> tuple[tuple[int, ...], Drawn | None]:
        wanted = outputs.next_token.shape[1]
        first = wanted - 1 - len(sequence.draft)
        self._keep_prompt(sequence, row, outputs, index, row.count - 1)
        tokens, reason = self._kept(sequence, outputs.next_token[index, first:].tolist())
        columns = slice(first, first + len(tokens))
        if error := self._masks.take_error(sequence.sequence_id):
            return tuple(tokens), Drawn(sequence, (), (), finish_reason="error", error=error)
        logprobs = tuple(outputs.logprob[index, columns].tolist())
        prompt = _joined(sequence.prompt_parts)
        sequence.prompt_parts.clear()
        written = Drawn(sequence, tuple(tokens), logprobs, _top(sequence, outputs, index, columns), prompt, reason)
        if not reason:
            self._writer.write(written)
        self._learn(sequence, len(tokens), rows)
        self._follow(sequence, tokens, rows)
        return tuple(tokens), written if reason else None

    def _kept(self, sequence: ActiveSequence, drawn: list[int]) -> tuple[list[int], str]:
        """The tokens that count: up to the first that differs from the draft, or that ends the answer."""
        parameters = sequence.request.parameters
        kept: list[int] = []
        for token, guess in zip(drawn, [*sequence.draft, None], strict=True):
            kept.append(token)
            is_eos = token in self._spec.eos_token_ids and not parameters.ignore_eos
            if is_eos or token in parameters.stop_token_ids:
                return kept, "stop"
            if sequence.answered + len(kept) >= sequence.max_tokens:
                return kept, "length"
            if token != guess:
                break
        return kept, ""

    def _learn(self, sequence: ActiveSequence, kept: int, rows: int) -> None:
        """How good the draft was."""
        drafted = len(sequence.draft)
        self._stats.drew(kept, drafted, kept - 1 if drafted else 0)
        if drafted:
            sequence.gain.observe(drafted, kept - 1, self.cost.ratio(rows, 1 + drafted))

    def _follow(self, sequence: ActiveSequence, tokens: list[int], rows: int) -> None:
        """Append the tokens and guess the next ones."""
        sequence.tokens += tokens
        if sequence.adjustments is not None:
            for token in tokens:
                sequence.adjustments.add(token)
            if sequence.answered >= sequence.request.parameters.min_tokens:
                sequence.adjustments.allow()
        sequence.draft = []
        if sequence.lookup is None:
            return
        for token in tokens:
            sequence.lookup.add(token)
        room = min(self._max_draft, sequence.max_tokens - sequence.answered - 1)
        room = self._droppable(len(sequence.tokens) - 1, room) if room > 0 else 0
        guess = sequence.lookup.propose(room) if room > 0 else []
        if guess and sequence.gain.worthwhile(len(guess), self.cost.ratio(rows, 1 + len(guess))):
            sequence.draft = guess

    def _droppable(self, past: int, wanted: int) -> int:
        """How long a draft may be; where steps are to be even, with room for the token that fills it up."""
        filler = int(self._spec.wants_even_steps)
        return max(0, self._runtime.max_draft(past, wanted + filler) - filler)

    def _keep_prompt(self, sequence: ActiveSequence, row: Row, outputs: StepOutputs, index: int, count: int) -> None:
        """Keep the prompt's log-probabilities that the first ``count`` positions of a chunk gave."""
        if sequence.request.parameters.prompt_logprobs is None or row.start >= sequence.prompt_length or not count:
            return
        columns = slice(0, count)
        part = PromptLogprobs(
            tuple(outputs.next_token[index, columns].tolist()),
            tuple(outputs.logprob[index, columns].tolist()),
            _tops(outputs, index, columns, sequence.request.parameters.prompt_logprobs),
        )
        sequence.prompt_parts.append(part)


def _top(sequence: ActiveSequence, outputs: StepOutputs, index: int, columns: slice) -> tuple[TopLogprobs, ...]:
    return _tops(outputs, index, columns, sequence.request.parameters.logprobs or 0)


def _tops(outputs: StepOutputs, index: int, columns: slice, count: int) -> tuple[TopLogprobs, ...]:
    if not count or outputs.top_ids is None or outputs.top_logprobs is None:
        return ()
    ids, values = outputs.top_ids[index, columns, :count], outputs.top_logprobs[index, columns, :count]
    return tuple(
        tuple(zip(row_ids, row_values, strict=True))
        for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
    )


def _joined(parts: list[PromptLogprobs]) -> PromptLogprobs | None:
    if not parts:
        return None
    return PromptLogprobs(
        tuple(token for part in parts for token in part.token_ids),
        tuple(value for part in parts for value in part.logprobs),
        tuple(top for part in parts for top in part.top),
    )
