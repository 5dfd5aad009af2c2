"""What the decode engine asks of a runtime: steps over slots of caller-owned KV caches.

A runtime loads one artefact folder (see `builders.repository`) and never learns what a request is; the engine never
learns which runtime executes. Shapes: B rows, S positions of a right-padded chunk, R positions whose logits are
wanted, M image embeddings, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from python_backends.errors import InternalError

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]


@dataclass(frozen=True)
class DecoderSpec:
    """What the engine must know of a decoder; filled by the runtime from the manifest."""

    vocab_size: int
    hidden_size: int
    num_slots: int
    """Rows of the KV caches, after clipping to the memory limit."""
    max_context_length: int
    """Tokens one slot can hold, after clipping."""
    image_token_id: int | None
    """Placeholder id that an image embedding replaces; None in a text-only model."""
    tokens_per_image: int
    """Embeddings of one image; 0 in a text-only model."""
    eos_token_ids: tuple[int, ...]
    wants_even_chunks: bool = False
    """A chunk of an odd number of prompt tokens may sum in another order than an even one (`decoder.batch.filler`)."""
    wants_even_steps: bool = False
    """The same of decode steps. Filled up they cost more, and a row's results are the same, bit for bit, with drafts
    and without, its own and others'."""
    on_gpu: bool = False
    """Slots lie in a GPU's memory: the host's is the tiers'."""


@dataclass(frozen=True)
class KvLayout:
    """Sizes of the KV that leaves a slot in pieces: blocks and tails, each one contiguous buffer of bytes.

    A block is ``block_tokens`` consecutive tokens of every global layer. A tail at position T is what resuming there
    needs beside the full blocks before it: the tokens of the partial block in every global layer, and the newest
    min(T, window) tokens of every local layer. Only a runtime of the same ``identity`` reads what lies in them.
    """

    identity: str
    """Differs wherever the bytes would mean something else: runtime, layout version, element type, model sizes."""
    dtype: str
    """Of one cache element, numpy's name."""
    block_tokens: int
    window: int
    """Tokens that a local layer sees, the query's own included."""
    global_bytes: int
    """Of one token in all global layers together."""
    local_bytes: int
    """Of one token in all local layers together."""

    @property
    def block_bytes(self) -> int:
        """Size of a block."""
        return self.block_tokens * self.global_bytes

    def tail_bytes(self, length: int) -> int:
        """Size of the tail at position ``length``."""
        return length % self.block_tokens * self.global_bytes + min(length, self.window) * self.local_bytes

    def first_block(self, blocks: int, length: int, kept: int, computed: int) -> int:
        """Index of the first of so many blocks that fill a slot (`DecoderRuntime.import_blocks`).

        Raises:
            InternalError: they do not make ``length`` tokens behind ``computed``, or not ``kept`` of them can count.
        """
        first = computed // self.block_tokens
        if blocks != length // self.block_tokens - first or not max(computed, length - 1) <= kept <= length:
            raise InternalError(
                f"{blocks} blocks of {self.block_tokens} tokens for {kept} of {length} tokens "
                f"behind {computed} computed"
            )
        return first

    @property
    def largest_tail_bytes(self) -> int:
        """Size of the largest tail there can be."""
        return (self.block_tokens - 1) * self.global_bytes + self.window * self.local_bytes


class SlotState(Protocol):
    """The KV of one sequence outside its slot; only the runtime looks inside."""

    @property
    def length(self) -> int:
        """Tokens."""
        ...

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        ...


@dataclass
class StepInputs:
    """One step over the slots ``first_slot … first_slot + B − 1``, row b of every array belonging to one slot.

    A row with ``query_len`` 0 is idle: its cache does not change and its outputs mean nothing.
    """

    first_slot: int
    input_ids: Int32
    """[B, S] right-padded."""
    past_len: Int32
    """[B] tokens already in the slot's cache."""
    query_len: Int32
    """[B] valid tokens of the row, 0 … S."""
    logit_positions: Int32
    """[B, R] positions within the chunk whose logits are wanted, 0 … S−1."""
    temperature: Float32
    """[B] 0 is greedy."""
    top_k: Int32
    """[B] 0 is off."""
    top_p: Float32
    """[B] 1 is off."""
    min_p: Float32
    """[B] 0 is off."""
    uniform: Float32
    """[B, R] one uniform number in (0, 1) per drawn token; unused where greedy."""
    targets: Int32 | None = None
    """[B, R] ids whose log-probability is wanted instead of a draw (prompt tokens), −1 where one is to be drawn."""
    adjust_ids: Int32 | None = None
    """[B, P] distinct ids whose logits change before the draw, −1 for padding: ``logit' = (logit > 0 ? logit / factor :
    logit · factor) + bias``. The reported log-probabilities are the model's own, before it."""
    adjust_factor: Float32 | None = None
    """[B, P]"""
    adjust_bias: Float32 | None = None
    """[B, P]"""
    token_mask: Int32 | None = None
    """[B, R, ceil(V / 32)] bit i % 32 of word i // 32 set where token i may be drawn."""
    top_n: int = 0
    """Most likely tokens to report per position."""
    image_features: Float32 | None = None
    """[M, D] embeddings of every image in the chunk, one after the other; None for a chunk without image."""
    image_index: Int32 | None = None
    """[B, S] row of image_features that replaces the token's embedding, −1 for text."""
    image_group: Int32 | None = None
    """[B, S] equal non-negative numbers for the tokens of one image, which see each other both ways; −1 for text."""
    attention_block: int = 0
    """Tokens of a block whose attention mass is wanted; 0 for none."""


def idle_inputs(first_slot: int, rows: int, width: int, wanted: int) -> StepInputs:
    """A greedy step of ``rows`` idle rows of ``width`` positions, of which ``wanted`` would have logits."""
    return StepInputs(
        first_slot=first_slot,
        input_ids=np.zeros((rows, width), np.int32),
        past_len=np.zeros(rows, np.int32),
        query_len=np.zeros(rows, np.int32),
        logit_positions=np.zeros((rows, wanted), np.int32),
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        uniform=np.full((rows, wanted), 0.5, np.float32),
    )


@dataclass
class StepOutputs:
    """What leaves the device."""

    next_token: Int32
    """[B, R] sampled ids."""
    logprob: Float32
    """[B, R] natural logarithm of the sampled token's probability in the model's own distribution (temperature 1)."""
    top_ids: Int32 | None = None
    """[B, R, top_n] in falling order of probability; None where top_n is 0."""
    top_logprobs: Float32 | None = None
    """[B, R, top_n]"""
    logits: Float32 | None = None
    """[B, R, V], the model's own, only when asked for."""
    block_attention: Float32 | None = None
    """[B, blocks] share of its attention that the row's last position in ``logit_positions`` gave each block of
    ``attention_block`` tokens, in one global layer, averaged over the heads; a row sums to 1. None where not asked
    for."""


class Transfer(Protocol):
    """A copy of KV that goes on beside the steps."""

    def done(self) -> bool:
        """Whether it is over. Raises InternalError: it failed."""
        ...

    def wait(self) -> None:
        """Until it is over; from any thread. Raises InternalError: it failed."""
        ...


class DecoderRuntime(Protocol):
    """Executes decoder steps. Not thread-safe: the engine calls it from one thread."""

    @property
    def spec(self) -> DecoderSpec:
        """Sizes after clipping."""
        ...

    @property
    def kv_layout(self) -> KvLayout:
        """Sizes of blocks and tails."""
        ...

    def step(self, inputs: StepInputs, *, want_logits: bool = False) -> StepOutputs:
        """Append the valid tokens to the slots' caches and return the tokens drawn at ``logit_positions``.

        An image's tokens must lie in one chunk. Raises InternalError where the backend fails.
        """
        ...

    def export_slot(self, slot: int, length: int) -> SlotState:
        """A copy of what ``length`` tokens left in a slot."""
        ...

    def import_slot(self, slot: int, state: SlotState) -> None:
        """Put it back, into any slot. A state may be imported many times."""
        ...

    def export_block(self, slot: int, start: int, into: memoryview) -> Transfer | None:
        """Copy the block of the computed tokens from ``start`` on into ``kv_layout.block_bytes`` bytes.

        None: it is there. Later steps and copies of the slot wait for a transfer where they must.
        """
        ...

    def export_tail(self, slot: int, length: int, into: memoryview) -> Transfer | None:
        """Copy the tail at ``length``, the number of tokens computed, into ``kv_layout.tail_bytes(length)`` bytes.

        As `export_block`.
        """
        ...

    def import_blocks(
        self,
        slot: int,
        blocks: Sequence[memoryview],
        tail: memoryview,
        length: int,
        *,
        keep: int | None = None,
        computed: int = 0,
    ) -> Transfer | None:
        """Put ``length`` tokens into a slot: their full blocks from the first on, and the tail at ``length``.

        The slot is then as if it had computed them, bit for bit where it matters. With ``keep`` one less than
        ``length`` it is as if it had computed all but the last: a tail's window reaches that far back. Where the slot
        has ``computed`` of the tokens already, ``blocks`` begin with the one that holds the next. Buffers must stay as
        they are until the transfer is over (None: it is); steps of the slot wait for it.
        """
        ...

    def max_draft(self, past_len: int, wanted: int) -> int:
        """How many tokens behind the next one may be computed and then dropped without a trace, at most ``wanted``.

        A window cache evicts in strides; a draft that would cross a stride could not be taken back.
        """
        ...

    def close(self) -> None:
        """Free every buffer."""
        ...


class VisionRuntime(Protocol):
    """Executes the vision tower and projector."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""
        ...

    def encode(self, pixels: UInt8) -> Float32:
        """[N, 3, H, W] uint8 RGB → [N, tokens_per_image, D] float32."""
        ...

    def close(self) -> None:
        """Free every buffer."""
        ...
