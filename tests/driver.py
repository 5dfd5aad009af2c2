"""Drives a decoder runtime as the engine does, one slot per prompt, and keeps what it answered."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from builders.checkpoint import ModelConfig, open_checkpoint
from builders.graph import write_decoder, write_vision_encoder
from builders.quantize import Precision
from python_backends.manifest import ImageShape, ModelShape
from python_backends.runtime.base import StepInputs
from python_backends.runtime.gpu.interpreter import InterpreterDevice
from python_backends.runtime.gpu.launch import Device
from python_backends.runtime.onnxruntime import OnnxRuntimeDecoder, OnnxRuntimeVision
from tests.checkpoints import scratch
from tests.prompts import Prompt

FP32 = Precision("fp32")


def model_shape(config: ModelConfig) -> ModelShape:
    image = None
    if config.vision is not None:
        image = ImageShape(
            config.vision.image_size,
            config.vision.tokens_per_image,
            config.image_token_id,
            config.boi_token_id,
            config.eoi_token_id,
        )
    names = {entry.name for entry in dataclasses.fields(ModelShape)} - {"image"}
    return ModelShape(**{name: getattr(config.text, name) for name in names}, image=image)


@functools.cache
def artefacts(checkpoint: Path, precision: Precision, accuracy_level: int = 4) -> Path:
    """Folder with the graphs of a checkpoint, built once per process."""
    folder = Path(tempfile.mkdtemp(prefix="graphs-", dir=scratch()))
    opened = open_checkpoint(checkpoint)
    write_decoder(opened, precision, folder, accuracy_level=accuracy_level)
    if opened.config.vision is not None:
        write_vision_encoder(opened, precision, folder, accuracy_level=accuracy_level)
    return folder


def decoder(
    checkpoint: Path,
    precision: Precision = FP32,
    *,
    num_slots: int = 4,
    context: int = 512,
    accuracy_level: int = 4,
    block_tokens: int = 64,
    memory_limit: int = 2**30,
    device: Device | None = None,
) -> OnnxRuntimeDecoder:
    return OnnxRuntimeDecoder(
        artefacts(checkpoint, precision, accuracy_level),
        model_shape(open_checkpoint(checkpoint).config),
        num_slots=num_slots,
        max_context_length=context,
        memory_limit=memory_limit,
        num_threads=2,
        block_tokens=block_tokens,
        device=device,
    )


def decoder_as_on_gpu(checkpoint: Path, precision: Precision = FP32, **sizes: int) -> OnnxRuntimeDecoder:
    """The graph, the steps and the caches that a GPU has, computed on the CPU."""
    return decoder(checkpoint, precision, **sizes, device=InterpreterDevice())


def vision(checkpoint: Path, precision: Precision = FP32) -> OnnxRuntimeVision:
    return OnnxRuntimeVision(artefacts(checkpoint, precision), num_threads=2)


def step_inputs(first_slot: int, chunks: Sequence[Sequence[int]], past: Sequence[int], **fields: object) -> StepInputs:
    """A greedy step over right-padded chunks that wants the logits of every position."""
    rows, length = len(chunks), max(1, *(len(chunk) for chunk in chunks))
    ids = np.zeros((rows, length), np.int32)
    for row, chunk in zip(ids, chunks, strict=True):
        row[: len(chunk)] = chunk
    inputs = StepInputs(
        first_slot=first_slot,
        input_ids=ids,
        past_len=np.array(past, np.int32),
        query_len=np.array([len(chunk) for chunk in chunks], np.int32),
        logit_positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int32),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        uniform=np.full((rows, length), 0.5, np.float32),
    )
    return dataclasses.replace(inputs, **fields)


class Driver:
    """Sequences in slots 0 … n − 1 of a runtime."""

    def __init__(
        self, runtime: OnnxRuntimeDecoder, prompts: Sequence[Prompt], encoder: OnnxRuntimeVision | None = None
    ) -> None:
        self.runtime = runtime
        self.prompts = prompts
        self.features = [
            encoder.encode(prompt.pixels) if encoder is not None and prompt.pixels is not None else None
            for prompt in prompts
        ]
        self.done = [0] * len(prompts)
        self.logits: list[list[NDArray[np.float32]]] = [[] for _ in prompts]
        self.tokens: list[list[int]] = [[] for _ in prompts]

    def prefill(self, cuts: Sequence[Sequence[int]] | None = None) -> None:
        """Append every prompt, cut at the given positions (moved behind pictures), all rows at once."""
        plans = [self._chunks(row, cuts[row] if cuts else ()) for row in range(len(self.prompts))]
        for index in range(max(len(plan) for plan in plans)):
            self.append([plan[index] if index < len(plan) else (0, 0) for plan in plans])

    def _chunks(self, row: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
        prompt = self.prompts[row]
        allowed = {
            next((stop for start, stop in prompt.spans if start < cut < stop), cut)
            for cut in cuts
            if 0 < cut < len(prompt.ids)
        }
        edges = [0, *sorted(allowed), len(prompt.ids)]
        return [(a, b) for a, b in itertools.pairwise(edges) if a < b]

    def append(self, ranges: Sequence[tuple[int, int]]) -> None:
        """One step: rows take prompt tokens [start, stop); (0, 0) is idle."""
        chunks = [prompt.ids[start:stop] for prompt, (start, stop) in zip(self.prompts, ranges, strict=True)]
        from python_backends.decoder.batch import filler  # needs what a GPU host may lack

        fills = [filler(b - a, b, self.runtime.max_draft) for a, b in ranges]
        filled = [[*chunk, *[0] * fill] for chunk, fill in zip(chunks, fills, strict=True)]
        inputs = step_inputs(0, filled, self.done)
        inputs.logit_positions = inputs.logit_positions[:, : max(1, *map(len, chunks))]
        features, index = [], np.full(inputs.input_ids.shape, -1, np.int32)
        group = index.copy()
        taken = 0
        for row, (prompt, (start, stop)) in enumerate(zip(self.prompts, ranges, strict=True)):
            for picture, (first, last) in enumerate(prompt.spans):
                if start <= first and last <= stop:
                    size = last - first
                    features.append(self.features[row][picture])
                    index[row, first - start : last - start] = np.arange(taken, taken + size)
                    group[row, first - start : last - start] = picture
                    taken += size
        if features:
            inputs.image_features = np.concatenate(features)
            inputs.image_index, inputs.image_group = index, group
        outputs = self.runtime.step(inputs, want_logits=True)
        for row, chunk in enumerate(chunks):
            if chunk:
                self.done[row] += len(chunk)
                self.logits[row].extend(outputs.logits[row, : len(chunk)])
                if self.done[row] == len(self.prompts[row].ids):
                    self.tokens[row].append(int(outputs.next_token[row, len(chunk) - 1]))

    def decode(self, steps: int) -> None:
        """Append each row's last token and draw the next, ``steps`` times."""
        for _ in range(steps):
            chunks = [[tokens[-1]] for tokens in self.tokens]
            outputs = self.runtime.step(step_inputs(0, chunks, self.done), want_logits=True)
            for row in range(len(chunks)):
                self.done[row] += 1
                self.logits[row].append(outputs.logits[row, 0])
                self.tokens[row].append(int(outputs.next_token[row, 0]))
