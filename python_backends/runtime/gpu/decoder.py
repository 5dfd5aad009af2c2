"""`DecoderRuntime` on a GPU: a step is two recordings, the layers and the head, replayed over paged KV.

Nothing waits for the device inside a step: the step's small arrays go up in one copy, both recordings are issued, and
the tokens come back in one copy.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from python_backends.errors import InternalError
from python_backends.manifest import ModelShape
from python_backends.runtime.base import DecoderSpec, KvLayout, SlotState, StepInputs, StepOutputs, Transfer
from python_backends.runtime.checks import check_step
from python_backends.runtime.gpu.device_weights import DeviceWeights
from python_backends.runtime.gpu.inputs import DECODE_POSITIONS, Bucket, StepLayout, bucket_of
from python_backends.runtime.gpu.kernels.most_likely import MAX_TOP_N
from python_backends.runtime.gpu.kv import PagedKv, plan_kv
from python_backends.runtime.gpu.launch import DTYPES, Device, Launch, Operation, Recording, Tensor
from python_backends.runtime.gpu.pages import PAGE_TOKENS
from python_backends.runtime.gpu.products import KernelProducts
from python_backends.runtime.gpu.program import Products, Program
from python_backends.runtime.rows import join_rows, single_row

MAX_LOGIT_ROWS = 64
"""Rows of logits that one pass of the head computes (64 MB of a vocabulary of 262,144); more take several passes."""
MAX_RECORDINGS = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuOptions:
    """What a decoder may take of its GPU."""

    num_slots: int
    max_context_length: int
    memory_limit: int
    """Bytes of device memory for weights, KV and buffers together."""
    prefill_chunk: int = 512
    """Most tokens of a step."""
    block_tokens: int = PAGE_TOKENS
    kv_dtype: str = ""
    """Triton-lang's name of the KV's element type; "" is that of the activations."""


class GpuDecoder:
    """`DecoderRuntime` over a device. Not thread-safe.

    Args:
        device: owns memory and runs the launches; closed with the decoder.
        model: sizes from the manifest.
        weights: on the device.
        options: limits.
        make_products: what computes between two attentions.

    Raises:
        ArtifactError: weights of another model, or kernels that are not there for this GPU.
        ConfigError: the memory does not suffice.
    """

    def __init__(
        self,
        device: Device,
        model: ModelShape,
        weights: DeviceWeights,
        options: GpuOptions,
        make_products: Callable[[Device, ModelShape, DeviceWeights, int], Products] = KernelProducts,
    ) -> None:
        self._device, self._model = device, model
        tokens = max(options.prefill_chunk, options.num_slots * DECODE_POSITIONS, DECODE_POSITIONS)
        self._tokens = 1 << (tokens - 1).bit_length()
        dtype = options.kv_dtype or weights.activation
        self.products = make_products(device, model, weights, self._tokens)
        self.program = Program(device, model, weights, self.products, self._tokens, MAX_LOGIT_ROWS)
        free = options.memory_limit - device.allocated_bytes
        sizes = plan_kv(model, options.num_slots, options.max_context_length, free, dtype)
        self.kv = PagedKv(device, model, sizes, dtype, options.block_tokens)
        self.program.bind(self.kv, 1 << (sizes.num_slots - 1).bit_length())
        self.recordings: dict[object, Recording] = {}
        image = model.image
        self._spec = DecoderSpec(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            num_slots=sizes.num_slots,
            max_context_length=min(sizes.context_length, model.max_context_length),
            image_token_id=image.image_token_id if image else None,
            tokens_per_image=image.tokens_per_image if image else 0,
            eos_token_ids=model.eos_token_ids,
            on_gpu=True,
        )
        _log.info(
            "decoder: %d slots of %d tokens, %.2f GB of KV, %.2f GB in all",
            sizes.num_slots,
            sizes.context_length,
            sizes.num_bytes / 1e9,
            device.allocated_bytes / 1e9,
        )

    @property
    def spec(self) -> DecoderSpec:
        """Sizes after clipping."""
        return self._spec

    @property
    def kv_layout(self) -> KvLayout:
        """See `DecoderRuntime.kv_layout`."""
        return self.kv.layout

    def step(self, inputs: StepInputs, *, want_logits: bool = False) -> StepOutputs:
        """See `DecoderRuntime.step`.

        Raises:
            InternalError: rows or tokens beyond the caches, images in a text-only model, or a failure of the driver.
        """
        self._device.activate()
        check_step(inputs, self._spec, takes_images=self._model.image is not None)
        bucket = bucket_of(inputs)
        if bucket.tokens > self._tokens:
            rows = len(inputs.input_ids)
            if rows == 1:
                raise InternalError(f"a chunk of {bucket.tokens} tokens; this decoder was made for {self._tokens}")
            return join_rows([self._step(single_row(inputs, row), want_logits) for row in range(rows)])
        return self._step(inputs, want_logits)

    def launches(self, buckets: Collection[Bucket]) -> list[Launch]:
        """The kernels of the steps of some buckets; those of layers that several share, once."""
        words = self.program.mask_words
        steps: list[Launch | Operation] = []
        for body in {bucket.body for bucket in buckets}:
            steps += self.program.layers(body, StepLayout(body, words))
        for bucket in buckets:
            steps += self.program.head(bucket, StepLayout(bucket, words))
        return [step for step in steps if isinstance(step, Launch)]

    def _step(self, inputs: StepInputs, want_logits: bool) -> StepOutputs:
        bucket = bucket_of(inputs)
        self._reserve(inputs)
        if bucket.images and inputs.image_features is not None:
            self.program.write_features(inputs.image_features)
        per_pass = max(1, MAX_LOGIT_ROWS // bucket.rows)
        wanted = inputs.logit_positions.shape[1]
        passes = [slice(start, start + per_pass) for start in range(0, wanted, per_pass)]
        outputs = []
        for index, positions in enumerate(passes):
            part = _positions(inputs, positions)
            head = bucket_of(part)
            layout = StepLayout(head, self.program.mask_words)
            self._device.write(self.program.words(layout.num_words), layout.pack(part))
            if index == 0:
                self._replay(("layers", bucket.body), functools.partial(self.program.layers, head, layout))
            self._replay(("head", head), functools.partial(self.program.head, head, layout))
            outputs.append(self._read(part, head, want_logits))
        found = _join_positions(outputs)
        if inputs.attention_block:
            found.block_attention = self._masses(inputs)
        return found

    def _reserve(self, inputs: StepInputs) -> None:
        """Pages for what the step appends; a sequence that starts anew gives its slot's old ones back."""
        rows = [
            (inputs.first_slot + row, int(past), int(query))
            for row, (past, query) in enumerate(zip(inputs.past_len, inputs.query_len, strict=True))
            if query > 0
        ]
        for slot, past, query in rows:
            self.kv.begin_step(slot, past, past + query)
            if past == 0:
                self.kv.release(slot)
        self.kv.reserve([(slot, past + query) for slot, past, query in rows])

    def _replay(self, key: object, steps: Callable[[], Sequence[Launch | Operation]]) -> None:
        if key not in self.recordings:
            if len(self.recordings) >= MAX_RECORDINGS:
                self.recordings.pop(next(iter(self.recordings))).close()
            self.recordings[key] = self._device.record(steps())
        self.recordings[key].replay()

    def _read(self, inputs: StepInputs, bucket: Bucket, want_logits: bool) -> StepOutputs:
        """What one pass of the head left, without the padding."""
        rows, wanted = inputs.logit_positions.shape
        results = self.program.results(bucket)
        words = self._device.read(results.words)

        def part(field: Tensor) -> NDArray[Any]:
            start = (field.address - results.words.address) // 4
            flat = words[start : start + field.size].view(DTYPES[field.dtype])
            return flat.reshape(bucket.rows, bucket.wanted, -1)[:rows, :wanted]

        outputs = StepOutputs(part(results.next_token)[..., 0].copy(), part(results.logprob)[..., 0].copy())
        from_logits = inputs.top_n > MAX_TOP_N
        if want_logits or from_logits:
            logits = self._device.read(results.logits).reshape(bucket.rows, bucket.wanted, -1)
            outputs.logits = logits[:rows, :wanted].copy()
        if from_logits and outputs.logits is not None:
            outputs.top_ids, outputs.top_logprobs = _most_likely(outputs.logits, inputs.top_n)
            outputs.logits = outputs.logits if want_logits else None
        elif inputs.top_n and results.top_ids and results.top_logprobs:
            outputs.top_ids = part(results.top_ids)[..., : inputs.top_n].copy()
            outputs.top_logprobs = part(results.top_logprobs)[..., : inputs.top_n].copy()
        return outputs

    def _masses(self, inputs: StepInputs) -> NDArray[np.float32]:
        """[B, blocks]: what the kernel says of pages, added up to blocks."""
        longest = max(1, int((inputs.past_len + inputs.query_len).max()))
        per_block = inputs.attention_block // PAGE_TOKENS
        if per_block * PAGE_TOKENS != inputs.attention_block:
            raise InternalError(f"attention masses of {inputs.attention_block} tokens; pages have {PAGE_TOKENS}")
        blocks = -(-longest // inputs.attention_block)
        by_page = self.program.read_masses(len(inputs.past_len), -(-longest // PAGE_TOKENS))
        padded = np.zeros((len(by_page), blocks * per_block), np.float32)
        padded[:, : by_page.shape[1]] = by_page
        masses: NDArray[np.float32] = padded.reshape(len(by_page), blocks, per_block).sum(axis=2)
        return masses

    # --- KV that leaves and enters ----------------------------------------------------------------------------

    def export_slot(self, slot: int, length: int) -> SlotState:
        """See `DecoderRuntime.export_slot`.

        Raises:
            InternalError: no such slot, or more tokens than one holds.
        """
        self._device.activate()
        return self.kv.export_slot(slot, length)

    def import_slot(self, slot: int, state: SlotState) -> None:
        """See `DecoderRuntime.import_slot`.

        Raises:
            InternalError: no such slot, or a state of another runtime.
        """
        self._device.activate()
        self.kv.import_slot(slot, state)

    def export_block(self, slot: int, start: int, into: memoryview) -> Transfer:
        """See `DecoderRuntime.export_block`.

        Raises:
            InternalError: no such slot or block, or a buffer of another size.
        """
        self._device.activate()
        return self.kv.export_block(slot, start, into)

    def export_tail(self, slot: int, length: int, into: memoryview) -> Transfer:
        """See `DecoderRuntime.export_tail`.

        Raises:
            InternalError: no such slot, more tokens than one holds, or a buffer of another size.
        """
        self._device.activate()
        return self.kv.export_tail(slot, length, into)

    def import_blocks(
        self,
        slot: int,
        blocks: Sequence[memoryview],
        tail: memoryview,
        length: int,
        *,
        keep: int | None = None,
        computed: int = 0,
    ) -> Transfer:
        """See `DecoderRuntime.import_blocks`. Pages hold tokens by their position: ``keep`` changes nothing.

        Raises:
            InternalError: no such slot, or buffers that do not add up; the slot's tokens are undefined then.
        """
        first = self.kv_layout.first_block(len(blocks), length, length if keep is None else keep, computed)
        self._device.activate()
        return self.kv.import_blocks(slot, blocks, tail, length, first=first)

    def max_draft(self, past_len: int, wanted: int) -> int:
        """See `DecoderRuntime.max_draft`: a ring keeps its window while a few more tokens are written."""
        return max(0, min(wanted, DECODE_POSITIONS - 1, self._spec.max_context_length - past_len - 1))

    def close(self) -> None:
        """Free everything on the device."""
        self._device.activate()
        self._device.synchronize()
        self.recordings.clear()
        self.products.close()
        self._device.close()


def _positions(inputs: StepInputs, positions: slice) -> StepInputs:
    """The step with some of its wanted positions."""
    changes: dict[str, Any] = {}
    for name in ("logit_positions", "uniform", "targets", "token_mask"):
        value = getattr(inputs, name)
        changes[name] = None if value is None else value[:, positions]
    return dataclasses.replace(inputs, **changes)


def _join_positions(parts: Sequence[StepOutputs]) -> StepOutputs:
    """Outputs of consecutive positions as one."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(StepOutputs):
        arrays = [getattr(part, field.name) for part in parts]
        joined[field.name] = None if arrays[0] is None else np.concatenate(arrays, 1)
    return StepOutputs(**joined)


def _most_likely(logits: NDArray[np.float32], count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(ids, log-probabilities) [B, R, count] of the largest logits; for more of them than the kernel reports."""
    peak = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - peak).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32) + peak
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :count]
    return ids.astype(np.int32), np.take_along_axis(logits, ids, -1) - total
