"""ONNX Runtime on the CPU: KV caches are ours, and every step appends to them in place.

The graphs are those of `builders.graph`. A step binds inputs, caches and outputs by address, so nothing but the small
inputs is written and no cache is ever copied.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
from numpy.typing import NDArray

from python_backends.errors import ArtifactError, InternalError
from python_backends.manifest import ModelShape
from python_backends.runtime.base import DecoderSpec, Float32, KvLayout, SlotState, StepInputs, StepOutputs, UInt8
from python_backends.runtime.checks import check_step
from python_backends.runtime.kernels import accelerate
from python_backends.runtime.memory import plan_slots
from python_backends.runtime.rows import join_rows, single_row
from python_backends.runtime.slots import DEFAULT_BLOCK_TOKENS, SlotCaches, SlotCopy

DECODER_FILE = "decoder.onnx"
VISION_FILE = "vision_encoder.onnx"

_DTYPES: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}
_VARIABLE = (
    *("input_ids", "logit_positions", "uniform", "targets", "adjust_ids", "adjust_factor", "adjust_bias", "token_mask"),
    *("next_token", "logprob", "top_ids", "top_logprobs", "block_attention"),
)
"""Inputs and outputs of several dimensions, none of which depends on the model."""
_MAX_BINDINGS = 64
_SHRINK_FROM = 64
"""Tokens of a chunk from which on its scratch memory goes back to the system when the step is over."""

_log = logging.getLogger(__name__)


class OnnxRuntimeDecoder:
    """`DecoderRuntime` over the decoder graph. Not thread-safe.

    Args:
        folder: holds ``decoder.onnx`` and its weights.
        model: sizes from the manifest.
        num_slots: slots wanted; clipped to the memory limit.
        max_context_length: tokens wanted per slot; clipped to the model's limit and the memory limit.
        memory_limit: bytes for KV caches.
        num_threads: compute threads; 0 takes every physical core.
        block_tokens: tokens of a KV block (`KvLayout`).
        cpu_kernels, kernel_fusion: see `Config`.

    Raises:
        ArtifactError: the graph is missing, corrupt or of another model.
        ConfigError: the memory limit is too small for one short slot.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelShape,
        *,
        num_slots: int,
        max_context_length: int,
        memory_limit: int,
        num_threads: int = 0,
        block_tokens: int = DEFAULT_BLOCK_TOKENS,
        cpu_kernels: str = "auto",
        kernel_fusion: bool = True,
    ) -> None:
        self._session = _open(folder / DECODER_FILE, num_threads, cpu_kernels, kernel_fusion=kernel_fusion)
        inputs = {item.name: item for item in self._session.get_inputs()}
        if _interface(self._session) != _wanted_interface(model):
            raise ArtifactError(_rebuild(folder / DECODER_FILE, "it is a decoder of another model or version"))
        dtype = _DTYPES[inputs["past_key.0"].type]
        plan = plan_slots(model, num_slots, max_context_length, memory_limit, dtype.itemsize)
        self._model = model
        self._takes_images = "image_index" in inputs
        self._slots = SlotCaches(model, plan, dtype, block_tokens)
        self._bindings: dict[tuple[int, ...], Any] = {}
        image = model.image
        self._spec = DecoderSpec(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            num_slots=plan.num_slots,
            max_context_length=plan.context_length,
            image_token_id=image.image_token_id if image else None,
            tokens_per_image=image.tokens_per_image if image else 0,
            eos_token_ids=model.eos_token_ids,
            wants_even_chunks=True,  # attention takes queries in even pieces; a last one of one row has its own kernel
            wants_even_steps=dtype == np.float32,  # who decodes in float32 wants to compare, and not to be fast
        )
        _log.info(
            "decoder: %d slots of %d tokens, %.2f GB when full",
            plan.num_slots,
            plan.context_length,
            plan.num_bytes / 1e9,
        )

    @property
    def spec(self) -> DecoderSpec:
        """Sizes after clipping."""
        return self._spec

    @property
    def kv_layout(self) -> KvLayout:
        """See `DecoderRuntime.kv_layout`."""
        return self._slots.layout

    def step(self, inputs: StepInputs, *, want_logits: bool = False) -> StepOutputs:
        """See `DecoderRuntime.step`.

        Raises:
            InternalError: rows or tokens beyond the caches, images in a text-only model, or a failure of the backend.
        """
        check_step(inputs, self._spec, takes_images=self._takes_images)
        rows, length = inputs.input_ids.shape
        # The operator wants room for the padding too (an idle row counts as one of past length 1). Near the end of a
        # context rows go one by one, unpadded.
        past = np.where(inputs.query_len > 0, inputs.past_len, 1)
        if int(past.max()) + length > self._spec.max_context_length:
            return join_rows([self._run(single_row(inputs, row), want_logits) for row in range(rows)])
        return self._run(inputs, want_logits)

    def export_slot(self, slot: int, length: int) -> SlotCopy:
        """See `DecoderRuntime.export_slot`.

        Raises:
            InternalError: no such slot, or more tokens than one holds.
        """
        return self._slots.export_slot(slot, length)

    def import_slot(self, slot: int, state: SlotState) -> None:
        """See `DecoderRuntime.import_slot`.

        Raises:
            InternalError: no such slot, or a state of another runtime.
        """
        if not isinstance(state, SlotCopy):
            raise InternalError(f"a slot state of another runtime: {type(state).__name__}")
        self._slots.import_slot(slot, state)

    def export_block(self, slot: int, start: int, into: memoryview) -> None:
        """See `DecoderRuntime.export_block`.

        Raises:
            InternalError: no such slot or block, or a buffer of another size.
        """
        self._slots.export_block(slot, start, into)

    def export_tail(self, slot: int, length: int, into: memoryview) -> None:
        """See `DecoderRuntime.export_tail`.

        Raises:
            InternalError: no such slot, more tokens than one holds, or a buffer of another size.
        """
        self._slots.export_tail(slot, length, into)

    def import_blocks(
        self, slot: int, blocks: Sequence[memoryview], tail: memoryview, length: int, *, keep: int | None = None
    ) -> None:
        """See `DecoderRuntime.import_blocks`.

        Raises:
            InternalError: no such slot, or buffers that do not add up; the slot's tokens are undefined then.
        """
        self._slots.import_blocks(slot, blocks, tail, length, keep=keep)

    def max_draft(self, past_len: int, wanted: int) -> int:
        """See `DecoderRuntime.max_draft`."""
        return self._slots.max_draft(past_len, wanted)

    def close(self) -> None:
        """Free caches and session."""
        self._bindings.clear()
        self._slots.buffers.clear()
        del self._session

    def _run(self, inputs: StepInputs, want_logits: bool) -> StepOutputs:
        rows, wanted = inputs.logit_positions.shape
        block = inputs.attention_block
        binding = self._binding(inputs.first_slot, rows, want_logits, inputs.top_n > 0, block > 0)
        arrays = self._feeds(inputs)  # referenced until the run is over: the binding holds addresses only
        for name, array in arrays.items():
            _bind(binding.bind_input, name, array)
        outputs = StepOutputs(np.empty((rows, wanted), np.int32), np.empty((rows, wanted), np.float32))
        if want_logits:
            outputs.logits = np.empty((rows, wanted, self._spec.vocab_size), np.float32)
        if inputs.top_n:
            outputs.top_ids = np.empty((rows, wanted, inputs.top_n), np.int32)
            outputs.top_logprobs = np.empty((rows, wanted, inputs.top_n), np.float32)
        if block:
            longest = max(1, int((inputs.past_len + inputs.query_len).max()))
            outputs.block_attention = np.empty((rows, -(-longest // block)), np.float32)
        for field in dataclasses.fields(outputs):
            array = getattr(outputs, field.name)
            if array is not None:
                _bind(binding.bind_output, field.name, array)
        try:
            self._session.run_with_iobinding(binding, self._run_options(inputs.input_ids.size))
        except Exception as error:  # the module's exceptions share no base class of their own
            raise InternalError(f"decoder step failed: {error}") from error
        return outputs

    @staticmethod
    def _run_options(tokens: int) -> onnxruntime.RunOptions:
        options = onnxruntime.RunOptions()
        if tokens > _SHRINK_FROM:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options

    def _feeds(self, inputs: StepInputs) -> dict[str, NDArray[Any]]:
        """Every input but the caches. What a step leaves out is empty, or as small as a chunk's ids."""
        feeds: dict[str, NDArray[Any]] = {
            name: _int32(getattr(inputs, name))
            for name in ("input_ids", "past_len", "query_len", "logit_positions", "top_k")
        }
        for name in ("temperature", "top_p", "min_p", "uniform"):
            feeds[name] = np.ascontiguousarray(getattr(inputs, name), np.float32)
        rows, wanted = inputs.logit_positions.shape
        targets, mask = inputs.targets, inputs.token_mask
        feeds["targets"] = np.full((rows, wanted), -1, np.int32) if targets is None else _int32(targets)
        feeds["token_mask"] = np.empty((rows, wanted, 0), np.int32) if mask is None else _int32(mask)
        feeds["top_n"] = np.array([inputs.top_n], np.int64)
        feeds["attention_block"] = np.array([inputs.attention_block], np.int64)
        for name, dtype in (("ids", np.int32), ("factor", np.float32), ("bias", np.float32)):
            value = getattr(inputs, f"adjust_{name}")
            feeds[f"adjust_{name}"] = (
                np.empty((rows, 0), dtype) if value is None else np.ascontiguousarray(value, dtype)
            )
        if self._takes_images:
            text = np.full(inputs.input_ids.shape, -1, np.int32)
            features, index, group = inputs.image_features, inputs.image_index, inputs.image_group
            none = features is None or len(features) == 0
            feeds["image_features"] = (
                np.zeros((1, self._spec.hidden_size), np.float32)
                if none
                else np.ascontiguousarray(features, np.float32)
            )
            feeds["image_index"] = text if index is None else np.ascontiguousarray(index, np.int32)
            feeds["image_group"] = text if group is None else np.ascontiguousarray(group, np.int32)
        return feeds

    def _binding(self, first_slot: int, rows: int, *wanted: bool) -> Any:
        """A binding whose cache inputs and outputs are the same addresses: rows first_slot … of our buffers.

        Steps that want other outputs (``wanted``: logits, most likely tokens, attention masses) have bindings of their
        own: what is bound once stays bound.
        """
        key = (first_slot, rows, *wanted)
        if key not in self._bindings:
            if len(self._bindings) >= _MAX_BINDINGS:
                del self._bindings[next(iter(self._bindings))]
            binding = self._session.io_binding()
            for name, cache in self._slots.buffers.items():
                part = cache[first_slot : first_slot + rows]
                _bind(binding.bind_input, f"past_{name}", part)
                _bind(binding.bind_output, f"present_{name}", part)
            self._bindings[key] = binding
        return self._bindings[key]


class OnnxRuntimeVision:
    """`VisionRuntime` over the vision graph. Not thread-safe.

    Raises:
        ArtifactError: the graph is missing or corrupt.
    """

    def __init__(
        self, folder: Path, *, num_threads: int = 0, cpu_kernels: str = "auto", kernel_fusion: bool = True
    ) -> None:
        self._session = _open(folder / VISION_FILE, num_threads, cpu_kernels, kernel_fusion=kernel_fusion)
        _, channels, height, width = self._session.get_inputs()[0].shape
        _, self._tokens, self._hidden = self._session.get_outputs()[0].shape
        self._image_shape = (int(channels), int(height), int(width))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""
        return self._image_shape

    def encode(self, pixels: UInt8) -> Float32:
        """[N, 3, H, W] uint8 RGB → [N, tokens_per_image, D] float32.

        Images are encoded one at a time: an image fills the cores, and memory does not grow with N.

        Raises:
            InternalError: another shape, or a failure of the backend.
        """
        if pixels.shape[1:] != self._image_shape or pixels.dtype != np.uint8:
            raise InternalError(f"pixels {pixels.dtype}{list(pixels.shape)}; wanted uint8 [N, {self._image_shape}]")
        features = np.empty((len(pixels), self._tokens, self._hidden), np.float32)
        for image, out in zip(pixels, features, strict=True):
            try:
                (encoded,) = self._session.run(["image_features"], {"pixels": image[None]})
            except Exception as error:  # the module's exceptions share no base class of their own
                raise InternalError(f"vision encoder failed: {error}") from error
            out[...] = encoded[0]
        return features

    def close(self) -> None:
        """Free the session."""
        del self._session


def _open(path: Path, num_threads: int, cpu_kernels: str, *, kernel_fusion: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if not kernel_fusion:  # our kernels run whole layers, and ONNX Runtime fuses above its basic level
        cpu_kernels = "onnxruntime"
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = num_threads or psutil.cpu_count(logical=False) or 1
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Triton's processes share the cores. With a busy neighbour, threads that spin made a 1B int4 decode step take
    # 55 to 240 ms instead of 38; alone they gain a tenth at most.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_mem_pattern = False  # a pattern is kept for every shape seen, and chunk shapes are many
    if not path.is_file():
        raise ArtifactError(_rebuild(path, "it is missing"))
    try:
        model = accelerate(path, options, cpu_kernels)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the module's exceptions share no base class of their own
        raise ArtifactError(_rebuild(path, f"it cannot be loaded ({error})")) from error


def _rebuild(path: Path, what: str) -> str:
    return f"{path}: {what}; rebuild the model repository with `wicore build CHECKPOINT --force`"


def _interface(session: onnxruntime.InferenceSession) -> dict[str, list[int]]:
    """The fixed dimensions of every input and output that depends on the model."""
    values = [*session.get_inputs(), *session.get_outputs()]
    return {
        value.name: [dim for dim in value.shape if isinstance(dim, int)] for value in values if len(value.shape) > 1
    }


def _wanted_interface(model: ModelShape) -> dict[str, list[int]]:
    sizes: dict[str, list[int]] = {name: [] for name in _VARIABLE}
    if model.image is not None:
        sizes |= {"image_features": [model.hidden_size], "image_index": [], "image_group": []}
    for layer in range(model.num_layers):
        for name in ("past_key", "past_value", "present_key", "present_value"):
            sizes[f"{name}.{layer}"] = [model.num_kv_heads, model.head_dim]
    return sizes | {"logits": [model.vocab_size]}


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _int32(values: NDArray[Any]) -> NDArray[np.int32]:
    return np.ascontiguousarray(values, np.int32)
