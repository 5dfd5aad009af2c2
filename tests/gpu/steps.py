"""Decode and prefill steps of a published shape: time, share of the floor, launches, and what the time goes to.

The floor of a decode step is the time to read the layers' and the head's weights and the live KV once at the rate of a
plain device copy measured in the same run. A step's time is that of its two graphs, back to back, by events.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from cuda.bindings import driver as cu

from builders.model_config import TextConfig
from builders.quantize import PrecisionName
from python_backends.manifest import ModelShape
from python_backends.runtime.base import StepInputs
from python_backends.runtime.gpu.cuda import CudaDevice, CudaRecording
from python_backends.runtime.gpu.decoder import GpuDecoder, GpuOptions
from python_backends.runtime.gpu.device_weights import DeviceWeights
from python_backends.runtime.gpu.inputs import StepLayout, bucket_of
from python_backends.runtime.gpu.launch import Launch, Tensor
from tests.gpu.report import Report
from tests.gpu.synthetic import fill_bytes, random_weights

REPEATS = 20


def event_ms(device: CudaDevice, run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median milliseconds of ``run`` on the device's stream."""
    stream = device.stream
    pairs = [[cu.cuEventCreate(0)[1] for _ in range(2)] for _ in range(repeats)]
    run()
    for start, end in pairs:
        cu.cuEventRecord(start, stream)
        run()
        cu.cuEventRecord(end, stream)
    device.synchronize()
    times = [cu.cuEventElapsedTime(start, end)[1] for start, end in pairs]
    for pair in pairs:
        for event in pair:
            cu.cuEventDestroy(event)
    return float(np.median(times))


def copy_rate(device: CudaDevice) -> float:
    """Bytes a second of a large device-to-device copy, read and written ones together."""
    size = 2 << 30
    source, target = (int(cu.cuMemAlloc(size)[1]) for _ in range(2))
    cu.cuMemsetD8(source, 1, size)
    milliseconds = event_ms(device, lambda: cu.cuMemcpyDtoDAsync(target, source, size, device.stream), 10)
    for address in (source, target):
        cu.cuMemFree(address)
    return 2 * size / milliseconds * 1e3


def greedy_inputs(vocab_size: int, batch: int, past: int, tokens: int = 1) -> StepInputs:
    """A greedy step of ``batch`` rows of ``tokens`` tokens after ``past`` in every slot."""
    rng = np.random.default_rng(2)
    return StepInputs(
        first_slot=0,
        input_ids=rng.integers(10, vocab_size - 10, (batch, tokens), np.int32),
        past_len=np.full(batch, past, np.int32),
        query_len=np.full(batch, tokens, np.int32),
        logit_positions=np.full((batch, 1), tokens - 1, np.int32),
        temperature=np.zeros(batch, np.float32),
        top_k=np.zeros(batch, np.int32),
        top_p=np.ones(batch, np.float32),
        min_p=np.zeros(batch, np.float32),
        uniform=np.full((batch, 1), 0.5, np.float32),
    )


def graphs_of(decoder: GpuDecoder, inputs: StepInputs) -> list[CudaRecording]:
    """What a step replays, after it has run once."""
    decoder.step(inputs)
    bucket = bucket_of(inputs)
    return [decoder.recordings["layers", bucket.body], decoder.recordings["head", bucket]]


@dataclass(frozen=True)
class Bench:
    """A decoder with random weights."""

    device: CudaDevice
    decoder: GpuDecoder
    weights: DeviceWeights
    model: ModelShape
    text: TextConfig
    bytes_per_second: float

    @classmethod
    def open(
        cls,
        device: CudaDevice,
        model: ModelShape,
        text: TextConfig,
        precision: PrecisionName,
        *,
        slots: int,
        context: int,
        chunk: int,
        kv_dtype: str = "",
    ) -> Bench:
        """Make the weights and the caches; every byte of both is random."""
        rate = copy_rate(device)
        weights = random_weights(device, text, precision)
        options = GpuOptions(slots, context, device.memory_limit, chunk, kv_dtype=kv_dtype)
        decoder = GpuDecoder(device, model, weights, options)
        block = (np.random.default_rng(1).standard_normal(8 << 20, np.float32)).view(np.uint32) >> 16
        noise = block.astype(np.uint16).view(np.uint8) if not kv_dtype else (block & 0x3F).astype(np.uint8)
        for pool in (decoder.kv.global_pool, decoder.kv.local_pool):
            fill_bytes(device, pool.address, pool.num_bytes, noise, 0)
        return cls(device, decoder, weights, model, text, rate)

    def weight_bytes(self) -> int:
        """What a step must read of the weights: every matrix once, the head in place of the embedding."""
        return self.weights.num_bytes

    def kv_bytes(self, lengths: Sequence[int]) -> int:
        """What a step must read of the caches."""
        layout = self.decoder.kv_layout
        return sum(length * layout.global_bytes + min(length, layout.window) * layout.local_bytes for length in lengths)

    def inputs(self, batch: int, past: int, tokens: int = 1) -> StepInputs:
        """A greedy step of ``batch`` rows after ``past`` tokens."""
        return greedy_inputs(self.model.vocab_size, batch, past, tokens)

    def decode(self, report: Report, section: str, batch: int, context: int) -> None:
        """Time one decode step."""
        inputs = self.inputs(batch, context - 1)
        first = time.perf_counter()
        replay = graphs_of(self.decoder, inputs)
        first = time.perf_counter() - first
        milliseconds = event_ms(self.device, lambda: [recording.replay() for recording in replay])
        began = time.perf_counter()
        for _ in range(REPEATS):
            self.decoder.step(inputs)
        wall = (time.perf_counter() - began) / REPEATS * 1e3
        floor = (self.weight_bytes() + self.kv_bytes([context] * batch)) / self.bytes_per_second * 1e3
        report.row(
            section,
            batch=batch,
            context=context,
            step_ms=milliseconds,
            floor_ms=floor,
            share=floor / milliseconds,
            wall_ms=wall,
            launches=sum(recording.num_operations for recording in replay),
            first_step_s=first,
            tokens_per_second=batch / wall * 1e3,
        )

    def prefill(self, report: Report, section: str, tokens: int, past: int = 0) -> None:
        """Time one chunk of a prompt."""
        inputs = self.inputs(1, past, tokens)
        replay = graphs_of(self.decoder, inputs)
        milliseconds = event_ms(self.device, lambda: [recording.replay() for recording in replay], 5)
        text = self.text
        width = text.num_heads * text.head_dim
        per_layer = text.hidden_size * (2 * width + 2 * text.num_kv_heads * text.head_dim + 3 * text.intermediate_size)
        flops = 2.0 * tokens * per_layer * text.num_layers
        report.row(
            section,
            tokens=tokens,
            past=past,
            chunk_ms=milliseconds,
            tokens_per_second=tokens / milliseconds * 1e3,
            matrix_tflops=flops / milliseconds / 1e9,
        )

    def breakdown(self, report: Report, section: str, batch: int, context: int, tokens: int = 1) -> None:
        """Time the launches of each kernel by themselves, recorded together, in the order in which they run."""
        inputs = self.inputs(batch, context - tokens, tokens)
        self.decoder.step(inputs)
        bucket = bucket_of(inputs)
        program = self.decoder.program
        layout = StepLayout(bucket, program.mask_words)
        groups: dict[str, list[Launch]] = defaultdict(list)
        for step in [*program.layers(bucket, layout), *program.head(bucket, layout)]:
            name = step.kernel if isinstance(step, Launch) else type(step).__name__
            groups[f"{name}{_shape(step)}"].append(step)
        for name, steps in groups.items():
            recording = self.device.record(steps)
            milliseconds = event_ms(self.device, recording.replay, 5)
            recording.close()
            report.row(section, batch=batch, context=context, kernel=name, count=len(steps), ms=milliseconds)


def _shape(step: object) -> str:
    """Tells products of different matrices apart."""
    if isinstance(step, Launch) and step.kernel.startswith("linear."):
        weights = [arg for arg in step.args if isinstance(arg, Tensor) and len(arg.shape) == 2]
        return " " + "x".join(str(size) for size in max(weights, key=lambda arg: arg.num_bytes).shape)
    return ""
