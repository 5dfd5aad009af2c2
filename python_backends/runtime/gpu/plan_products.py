"""What lies between two attentions, by TensorRT plans: one for all layers, their weights bound where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from python_backends.manifest import ModelShape
from python_backends.runtime.gpu.device_weights import DeviceWeights
from python_backends.runtime.gpu.launch import Device, Operation, Tensor
from python_backends.runtime.gpu.plan_execution import PlanRunner
from python_backends.runtime.gpu.plans import BETWEEN, FIRST, LAST, PIECES, SIGNED_INT4, Plan, PlanIndex
from python_backends.runtime.gpu.program import Products, Step
from python_backends.runtime.gpu.weights import Names

_OF_NEXT_LAYER = frozenset((Names.INPUT_NORM, Names.QKV, Names.scale(Names.QKV)))


class Runner(Protocol):
    """A loaded plan, see `PlanRunner`."""

    @property
    def plan(self) -> Plan:
        """What it takes and gives."""
        ...

    def scratch_bytes(self) -> int:
        """Memory that it needs beside its tensors."""
        ...

    def use_scratch(self, scratch: Tensor) -> None:
        """Take scratch memory."""
        ...

    def operation(self, bindings: Mapping[str, Tensor]) -> Operation:
        """The plan over tensors."""
        ...

    def save(self) -> None:
        """Keep what was compiled."""
        ...

    def close(self) -> None:
        """Free the plan."""
        ...


class PlanProducts:
    """`Products` over a decoder's weights, its head by others.

    Args:
        device: where everything lies.
        model: sizes.
        weights: on the device. Four-bit matrices are copied, because plans read them signed.
        runners: the pieces by name.
        max_tokens: most of a step.
        head: computes the logits.

    Raises:
        ConfigError: the device has no room.
    """

    def __init__(
        self,
        device: Device,
        model: ModelShape,
        weights: DeviceWeights,
        runners: Mapping[str, Runner],
        max_tokens: int,
        head: Products,
    ) -> None:
        self._device, self._model, self._weights, self._head = device, model, weights, head
        self._runners = runners
        hidden, width = model.hidden_size, model.num_heads * model.head_dim
        packed = width + 2 * model.num_kv_heads * model.head_dim
        self._packed = device.allocate(weights.activation, max_tokens, packed)
        # A plan may not write what it reads, so the stream goes from one buffer to the other, and back to the caller's.
        self._streams = [device.allocate("fp32", max_tokens, hidden) for _ in range(2)]
        self._signed: dict[str, Tensor] = {}
        scratch = device.allocate("u8", max(1, *(runner.scratch_bytes() for runner in runners.values())))
        for runner in runners.values():
            runner.use_scratch(scratch)

    @classmethod
    def load(
        cls,
        device: Device,
        model: ModelShape,
        weights: DeviceWeights,
        folder: Path,
        index: PlanIndex,
        max_tokens: int,
        head: Products,
    ) -> PlanProducts:
        """From the plans in ``folder``.

        Raises:
            ArtifactError: a plan cannot be loaded here.
            ConfigError: the device has no room.
        """
        runners = {name: PlanRunner(device, folder, index, name) for name in PIECES}
        return cls(device, model, weights, runners, max_tokens, head)

    def first(self, tokens: int, stream: Tensor) -> tuple[list[Step], Tensor]:
        """See `Products.first`."""
        packed = self._packed.view(0, tokens, self._packed.shape[1])
        return [self._operation(FIRST, -1, stream=stream, packed=packed)], packed

    def between(self, layer: int, tokens: int, attended: Tensor, stream: Tensor) -> tuple[list[Step], Tensor | None]:
        """See `Products.between`."""
        is_last = layer + 1 == self._model.num_layers
        buffers = [buffer.view(0, tokens, self._model.hidden_size) for buffer in self._streams]
        source = stream if layer == 0 else buffers[layer % 2]
        target = stream if is_last else buffers[(layer + 1) % 2]
        bindings = {"attended": attended, "stream": source, "next_stream": target}
        if is_last:
            return [self._operation(LAST, layer, **bindings)], None
        packed = self._packed.view(0, tokens, self._packed.shape[1])
        return [self._operation(BETWEEN, layer, packed=packed, **bindings)], packed

    def logits(self, normed: Tensor, logits: Tensor) -> list[Step]:
        """See `Products.logits`."""
        return self._head.logits(normed, logits)

    def save(self) -> None:
        """Keep what was compiled for this GPU."""
        for runner in self._runners.values():
            runner.save()

    def close(self) -> None:
        """Free the plans; the memory is the device's."""
        for runner in self._runners.values():
            runner.close()

    def _operation(self, piece: str, layer: int, **data: Tensor) -> Operation:
        """A piece behind a layer's attention; −1 stands before the first layer."""
        runner = self._runners[piece]
        bindings = dict(data)
        for tensor in runner.plan.inputs:
            if tensor.name not in data:
                name = Names.layer(layer + (tensor.name in _OF_NEXT_LAYER), tensor.name)
                bindings[tensor.name] = self._four_bits(name) if tensor.dtype == "i4" else self._weights.vector(name)
        return runner.operation(bindings)

    def _four_bits(self, name: str) -> Tensor:
        if name not in self._signed:
            stored = self._weights.vector(name)
            self._signed[name] = self._device.allocate(stored.dtype, *stored.shape)
            self._device.write(self._signed[name], self._device.read(stored) ^ SIGNED_INT4)
        return self._signed[name]
