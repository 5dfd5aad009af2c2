"""The sampling kernels by themselves, with the inputs and outputs of `tests.builders.graph.sampling_graph`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from python_backends.runtime.gpu.kernels import adjust, choice, most_likely, sampling
from python_backends.runtime.gpu.launch import Tensor
from tests.gpu.device import kernel_device
from tests.python_backends.runtime.gpu.paged import upload

Array = NDArray[Any]


class KernelSampler:
    """Logits [B, R, V] and any other inputs by name → outputs by name. Scratch is used again, as in a decoder."""

    def __init__(self, rows: int, vocab_size: int, list_size: int = sampling.LIST) -> None:
        self.device = kernel_device()
        self.vocab_size = vocab_size
        self.pieces = choice.Scratch.allocate(self.device, rows, vocab_size)
        self.drawing = sampling.Scratch.allocate(self.device, rows, list_size)
        self.ranks = most_likely.allocate_scratch(self.device, rows, vocab_size)

    def __call__(self, logits: Array, **inputs: Any) -> dict[str, Array]:
        device = self.device
        rows, positions, vocab_size = np.shape(logits)
        count = rows * positions
        neutral: dict[str, tuple[str, Any]] = {
            "temperature": ("fp32", np.zeros(rows)),
            "top_k": ("i32", np.zeros(rows)),
            "top_p": ("fp32", np.ones(rows)),
            "min_p": ("fp32", np.zeros(rows)),
            "uniform": ("fp32", np.full((rows, positions), 0.5)),
            "targets": ("i32", np.full((rows, positions), -1)),
        }
        listed = np.asarray(inputs.get("adjust_ids", np.zeros((rows, 0))))
        if listed.size:
            neutral["adjust_ids"] = ("i32", None)
            neutral["adjust_factor"] = ("fp32", np.ones(listed.shape))
            neutral["adjust_bias"] = ("fp32", np.zeros(listed.shape))
        if np.size(inputs.get("token_mask", ())):
            neutral["token_mask"] = ("i32", None)
        given: dict[str, Tensor] = {
            name: upload(device, dtype, np.asarray(inputs.get(name, value))) for name, (dtype, value) in neutral.items()
        }
        own = upload(device, "fp32", np.ascontiguousarray(logits).reshape(count, vocab_size))
        launches, source = [], own
        changes = {name: given[name] for name in given if name.startswith("adjust_") or name == "token_mask"}
        if changes:
            source = device.allocate("fp32", count, vocab_size)
            launches += adjust.adjust(own, source, positions, **changes)
        launches.append(choice.largest(own, source, self.pieces))
        random = bool((np.asarray(inputs.get("temperature", 0)) > 0).any())
        if random:
            filters = sampling.Filters(*(given[name] for name in ("temperature", "top_k", "top_p", "min_p", "uniform")))
            launches += sampling.draw(source, self.pieces.bests, given["targets"], filters, self.drawing)
        token, logprob = device.allocate("i32", count), device.allocate("fp32", count)
        drawn = {"drawn": self.drawing.drawn, "temperature": given["temperature"]} if random else {}
        launches.append(choice.choose(own, given["targets"], self.pieces, token, logprob, **drawn))
        top_n = int(np.asarray(inputs.get("top_n", [0]))[0])
        width = 1 << max(0, top_n - 1).bit_length()
        ids, values = device.allocate("i32", count, width), device.allocate("fp32", count, width)
        if top_n:
            launches += most_likely.most_likely(own, self.pieces, self.ranks, ids, values)
        for launch in launches:
            device.launch(launch)

        def result(tensor: Tensor) -> Array:
            found: Array = device.read(tensor).reshape(rows, positions, -1)
            return found

        return {
            "next_token": result(token)[..., 0],
            "logprob": result(logprob)[..., 0],
            "top_ids": result(ids)[..., :top_n],
            "top_logprobs": result(values)[..., :top_n],
        }
