"""What lies between two attentions, by TensorRT plans: three plans serve all layers, since weights are their inputs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from python_backends.manifest import ModelShape
from python_backends.runtime.gpu.cuda import Copy
from python_backends.runtime.gpu.device_weights import DeviceWeights
from python_backends.runtime.gpu.execution import LoadedPlan
from python_backends.runtime.gpu.launch import Device, Tensor
from python_backends.runtime.gpu.plans import BETWEEN, FIRST, LAST, PIECES, Plan, PlanIndex
from python_backends.runtime.gpu.products import KernelProducts, Step
from python_backends.runtime.gpu.weights import Names

_DATA = frozenset(("stream", "attended", "next_stream", "packed"))
_OF_NEXT_LAYER = frozenset((Names.INPUT_NORM, Names.QKV, Names.scale(Names.QKV)))


class PlanProducts:
    """`Products` over plans; the head's product is a kernel (`KernelProducts.logits`).

    Args:
        device: owns memory.
        model: sizes.
        weights: on the device.
        max_tokens: of a step.
        folder: of the plans.
        index: of the plans.

    Raises:
        ArtifactError: plans of another version or for another GPU.
    """

    def __init__(
        self,
        device: Device,
        model: ModelShape,
        weights: DeviceWeights,
        max_tokens: int,
        folder: Path,
        index: PlanIndex,
    ) -> None:
        self._model, self._weights = model, weights
        self._kernels = KernelProducts(device, model, weights, max_tokens)
        self._plans = {piece: LoadedPlan(device, folder, index, index[piece]) for piece in PIECES}
        packed = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        self._next = device.allocate("fp32", max_tokens, model.hidden_size)
        self._packed = device.allocate(weights.activation, max_tokens, packed)

    def first(self, tokens: int, stream: Tensor) -> tuple[list[Step], Tensor]:
        """See `Products.first`."""
        packed = self._packed.view(0, tokens, self._packed.shape[1])
        loaded = self._plans[FIRST]
        tensors = {"stream": stream, "packed": packed, **self._inputs(loaded.plan, layer=-1)}
        return [loaded.execution(tensors)], packed

    def between(self, layer: int, tokens: int, attended: Tensor, stream: Tensor) -> tuple[list[Step], Tensor | None]:
        """See `Products.between`. A plan's output may not lie on its input: the new stream is copied to the old one."""
        is_last = layer + 1 == self._model.num_layers
        loaded = self._plans[LAST if is_last else BETWEEN]
        after = self._next.view(0, tokens, self._model.hidden_size)
        tensors = {"stream": stream, "attended": attended, "next_stream": after, **self._inputs(loaded.plan, layer)}
        packed = None
        if not is_last:
            packed = tensors["packed"] = self._packed.view(0, tokens, self._packed.shape[1])
        return [loaded.execution(tensors), Copy(stream, after)], packed

    def logits(self, normed: Tensor, logits: Tensor) -> list[Step]:
        """See `Products.logits`."""
        return self._kernels.logits(normed, logits)

    def save_kernels(self) -> None:
        """Keep what the plans compiled for the next start."""
        for loaded in self._plans.values():
            loaded.save_kernels()

    def _inputs(self, plan: Plan, layer: int) -> dict[str, Tensor]:
        """The weights that a plan takes for a layer; some are of the layer that follows."""
        return {
            name: self._weights.vector(Names.layer(layer + (name in _OF_NEXT_LAYER), name)) for name in _weights(plan)
        }


def _weights(plan: Plan) -> Iterable[str]:
    return (tensor.name for tensor in plan.inputs if tensor.name not in _DATA)
