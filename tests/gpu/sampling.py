"""Time of what a head launches behind its logits, on the card: greedy, drawn, adjusted, the most likely tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from python_backends.runtime.gpu.compile import KernelCache
from python_backends.runtime.gpu.cuda import CudaDevice
from python_backends.runtime.gpu.kernels import adjust, choice, most_likely, sampling
from python_backends.runtime.gpu.launch import Launch, Tensor
from tests.gpu.report import Report
from tests.gpu.steps import event_ms

VOCABULARY = 262_208
ADJUSTED = 512
DISTRIBUTIONS = {
    "peaked": lambda rng, shape: 3 * rng.standard_t(5, shape),  # thousands of tokens hold next to everything
    "flat": lambda rng, shape: rng.normal(0, 1, shape),  # as random weights give
    "equal": lambda rng, shape: np.zeros(shape),  # the worst case: nothing but ties
}
FILTERS = {  # temperature, top-k, top-p, min-p
    "temperature": (1.0, 0, 1.0, 0.0),
    "top-p": (1.0, 0, 0.95, 0.0),
    "top-k": (1.0, 64, 1.0, 0.0),
    "top-k, top-p": (1.0, 64, 0.95, 0.0),
    "all": (1.0, 1000, 0.95, 0.01),
    "greedy rows": (0.0, 0, 1.0, 0.0),
}


def sampling_times(report: Report, kernels: KernelCache) -> None:
    """Microseconds for 1 and 16 rows."""
    device = CudaDevice(kernels)
    rng = np.random.default_rng(0)
    for name, make in DISTRIBUTIONS.items():
        for rows in (1, 16):
            _one(report, device, name, make(rng, (rows, VOCABULARY)).astype(np.float32))
    device.close()


def _one(report: Report, device: CudaDevice, name: str, values: NDArray[np.float32]) -> None:
    rows = len(values)

    def new(dtype: str, array: NDArray[np.generic]) -> Tensor:
        tensor = device.allocate(dtype, *array.shape)
        device.write(tensor, array)
        return tensor

    logits, adjusted = new("fp32", values), device.allocate("fp32", rows, VOCABULARY)
    targets = new("i32", np.full((rows, 1), -1, np.int32))
    pieces, drawing = choice.Scratch.allocate(device, rows, VOCABULARY), sampling.Scratch.allocate(device, rows)
    token, logprob = device.allocate("i32", rows), device.allocate("fp32", rows)
    uniform = np.random.default_rng(1).random((rows, 1), np.float32)

    def time(what: str, launches: list[Launch]) -> None:
        recording = device.record(launches)
        microseconds = event_ms(device, recording.replay) * 1e3
        report.row("sampling", logits=name, rows=rows, what=what, us=microseconds, launches=len(launches))
        recording.close()

    first = choice.largest(logits, logits, pieces)
    time("greedy", [first, choice.choose(logits, targets, pieces, token, logprob)])
    for label, (temperature, top_k, top_p, min_p) in FILTERS.items():
        filters = sampling.Filters(
            new("fp32", np.full(rows, temperature, np.float32)),
            new("i32", np.full(rows, top_k, np.int32)),
            new("fp32", np.full(rows, top_p, np.float32)),
            new("fp32", np.full(rows, min_p, np.float32)),
            new("fp32", uniform),
        )
        tally, draw = sampling.draw(logits, pieces.bests, targets, filters, drawing)
        last = choice.choose(
            logits, targets, pieces, token, logprob, drawn=drawing.drawn, temperature=filters.temperature
        )
        time(label, [first, tally, draw, last])
    listed = np.stack([np.random.default_rng(row).choice(VOCABULARY, ADJUSTED, replace=False) for row in range(rows)])
    changes = {
        "adjust_ids": new("i32", listed.astype(np.int32)),
        "adjust_factor": new("fp32", np.full(listed.shape, 1.2, np.float32)),
        "adjust_bias": new("fp32", np.full(listed.shape, -0.5, np.float32)),
    }
    mask = new("i32", np.full((rows, 1, VOCABULARY // 32), -1, np.int32))
    time("adjustments and mask", adjust.adjust(logits, adjusted, 1, **changes, token_mask=mask))
    ranks = most_likely.allocate_scratch(device, rows, VOCABULARY)
    for count in (1, 8, 32):
        results = device.allocate("i32", rows, count), device.allocate("fp32", rows, count)
        time(f"most likely {count}", most_likely.most_likely(logits, pieces, ranks, *results))
