"""ONNX Runtime on the CPU or a GPU: KV caches are ours, and every step appends to them in place.

The graphs are those of `builders.graph`; on a GPU `cuda_graph` changes what its kernels want otherwise. A step binds
inputs, caches and outputs by address, so nothing but the small inputs is written and no cache is ever copied.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto

from python_backends.errors import ArtifactError, InternalError
from python_backends.manifest import ModelShape
from python_backends.runtime.base import DecoderSpec, Float32, KvLayout, SlotState, StepInputs, StepOutputs, UInt8
from python_backends.runtime.checks import check_step
from python_backends.runtime.cuda_graph import TOTAL_LENGTH, needs_whole_caches, rewrite_for_cuda
from python_backends.runtime.device_slots import DeviceSlots
from python_backends.runtime.gpu.launch import Device
from python_backends.runtime.memory import plan_slots
from python_backends.runtime.providers import CPU, CUDA, open_session, rebuild
from python_backends.runtime.rows import join_rows, single_row, spread_rows, unpadded
from python_backends.runtime.slots import DEFAULT_BLOCK_TOKENS, SlotCaches, SlotCopy

DECODER_FILE = "decoder.onnx"
VISION_FILE = "vision_encoder.onnx"

_CACHES: dict[str, tuple[np.dtype[Any], int]] = {
    "tensor(float)": (np.dtype(np.float32), TensorProto.FLOAT),
    "tensor(float16)": (np.dtype(np.float16), TensorProto.FLOAT16),
    "tensor(bfloat16)": (np.dtype(ml_dtypes.bfloat16), TensorProto.BFLOAT16),
}
"""Element types of caches: NumPy's and ONNX's."""
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
        provider: `CPU` or `CUDA`.
        device: where the caches lie, closed with the decoder; None is host memory of our own. With one the graph is
            that for CUDA, whatever the provider, and every step goes in parts without padding.

    Raises:
        ArtifactError: the graph is missing, corrupt or of another model, or the provider cannot be used.
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
        provider: str = CPU,
        device: Device | None = None,
    ) -> None:
        path = folder / DECODER_FILE
        graph = None if device is None else _for_cuda(path)
        self._provider, self._on_device = provider, device is not None
        self._session = open_session(path, provider, num_threads, cpu_kernels, kernel_fusion=kernel_fusion, model=graph)
        inputs = {item.name: item for item in self._session.get_inputs()}
        self._counts_total = TOTAL_LENGTH in inputs
        if _interface(self._session) != _wanted_interface(model):
            raise ArtifactError(rebuild(path, "it is a decoder of another model or version"))
        dtype, self._cache_type = _CACHES[inputs["past_key.0"].type]
        sizes = num_slots, max_context_length, memory_limit, dtype.itemsize
        self._model = model
        self._takes_images = "image_index" in inputs
        if device is None:
            plan = plan_slots(model, *sizes)
            self._slots = SlotCaches(model, plan, dtype, block_tokens)
        else:
            rows = 0 if needs_whole_caches(self._cache_type) else model.sliding_window  # slack is refused there
            plan = plan_slots(model, *sizes, local_rows=rows, setting="gpu_memory_gb")
            self._slots = DeviceSlots(device, model, plan, dtype, block_tokens)
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
            # On the CPU attention takes queries in even pieces; a last one of one row has its own kernel.
            wants_even_chunks=device is None,
            # Who decodes in float32 wants to compare, and not to be fast.
            wants_even_steps=device is None and dtype == np.float32,
            on_gpu=provider == CUDA,
        )
        _log.info(
            "decoder on %s: %d slots of %d tokens, %.2f GB when full",
            provider,
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
        if self._on_device:
            return spread_rows(
                [(part, self._run(step, want_logits)) for part, step in unpadded(inputs)],
                self._room(inputs, want_logits),
            )
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
        self,
        slot: int,
        blocks: Sequence[memoryview],
        tail: memoryview,
        length: int,
        *,
        keep: int | None = None,
        computed: int = 0,
    ) -> None:
        """See `DecoderRuntime.import_blocks`.

        Raises:
            InternalError: no such slot, or buffers that do not add up; the slot's tokens are undefined then.
        """
        self._slots.import_blocks(slot, blocks, tail, length, keep=keep, computed=computed)

    def max_draft(self, past_len: int, wanted: int) -> int:
        """See `DecoderRuntime.max_draft`."""
        return self._slots.max_draft(past_len, wanted)

    def close(self) -> None:
        """Free caches and session."""
        self._bindings.clear()
        del self._session
        self._slots.close()

    def _run(self, inputs: StepInputs, want_logits: bool) -> StepOutputs:
        rows = len(inputs.past_len)
        binding = self._binding(inputs.first_slot, rows, want_logits, inputs.top_n > 0, inputs.attention_block > 0)
        arrays = self._feeds(inputs)  # referenced until the run is over: the binding holds addresses only
        for name, array in arrays.items():
            _bind(binding.bind_input, name, array)
        outputs = self._room(inputs, want_logits)
        for field in dataclasses.fields(outputs):
            array = getattr(outputs, field.name)
            if array is not None:
                _bind(binding.bind_output, field.name, array)
        try:
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding, self._run_options(inputs.input_ids.size))
            binding.synchronize_outputs()
        except Exception as error:  # the module's exceptions share no base class of their own
            raise InternalError(f"decoder step failed: {error}") from error
        return outputs

    def _room(self, inputs: StepInputs, want_logits: bool) -> StepOutputs:
        """Outputs to fill, zeros so far."""
        rows, wanted = inputs.logit_positions.shape
        outputs = StepOutputs(np.zeros((rows, wanted), np.int32), np.zeros((rows, wanted), np.float32))
        if want_logits:
            outputs.logits = np.zeros((rows, wanted, self._spec.vocab_size), np.float32)
        if inputs.top_n:
            outputs.top_ids = np.zeros((rows, wanted, inputs.top_n), np.int32)
            outputs.top_logprobs = np.zeros((rows, wanted, inputs.top_n), np.float32)
        if inputs.attention_block:
            longest = max(1, int((inputs.past_len + inputs.query_len).max()))
            outputs.block_attention = np.zeros((rows, -(-longest // inputs.attention_block)), np.float32)
        return outputs

    def _run_options(self, tokens: int) -> onnxruntime.RunOptions:
        options = onnxruntime.RunOptions()
        if tokens > _SHRINK_FROM and self._provider == CPU:  # a GPU waits for everything while it frees memory
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
        if self._counts_total:
            feeds[TOTAL_LENGTH] = np.array(max(1, int((inputs.past_len + inputs.query_len).max())), np.int32)
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
            for name in self._slots.names:
                place = self._cache_type, *self._slots.place(name, first_slot, rows)
                binding.bind_input(f"past_{name}", self._provider, 0, *place)
                binding.bind_output(f"present_{name}", self._provider, 0, *place)
            self._bindings[key] = binding
        return self._bindings[key]


class OnnxRuntimeVision:
    """`VisionRuntime` over the vision graph, on `CPU` or `CUDA`. Not thread-safe.

    Raises:
        ArtifactError: the graph is missing or corrupt, or the provider cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_threads: int = 0,
        cpu_kernels: str = "auto",
        kernel_fusion: bool = True,
        provider: str = CPU,
    ) -> None:
        path = folder / VISION_FILE
        self._session = open_session(path, provider, num_threads, cpu_kernels, kernel_fusion=kernel_fusion)
        _, channels, height, width = self._session.get_inputs()[0].shape
        _, self._tokens, self._hidden = self._session.get_outputs()[0].shape
        self._image_shape = (int(channels), int(height), int(width))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""
        return self._image_shape

    def encode(self, pixels: UInt8) -> Float32:
        """[N, 3, H, W] uint8 RGB → [N, tokens_per_image, D] float32.

        Images are encoded one at a time: an image fills the cores or the GPU, and memory does not grow with N.

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


def _for_cuda(path: Path) -> bytes:
    if not path.is_file():
        raise ArtifactError(rebuild(path, "it is missing"))
    try:
        return rewrite_for_cuda(path)
    except Exception as error:  # protobuf's exceptions share no base class with what a wrong graph raises
        raise ArtifactError(rebuild(path, f"it cannot be loaded ({error})")) from error


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
