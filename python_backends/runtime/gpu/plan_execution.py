"""Plans as operations of a device's stream: addresses bound once per operation.

An operation can be captured in a CUDA graph: everything that allocates or compiles happens when it is first issued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from python_backends.errors import InternalError
from python_backends.runtime.gpu.engines import RuntimeCache, load_engine, load_module
from python_backends.runtime.gpu.launch import Device, Tensor
from python_backends.runtime.gpu.plans import PlanIndex, PlanTensor

CACHE_SUFFIX = ".compiled"
"""Of the file beside a plan that keeps what was compiled for the GPU."""


class PlanRunner:
    """A plan on the GPU with one execution context per profile. Not thread-safe.

    Args:
        device: its context must be the calling thread's.
        folder: where the plan lies; what is compiled for this GPU is kept there by `save`.
        index: the one it is in.
        name: of the plan.

    Raises:
        ArtifactError: see `engines.load_engine`.
    """

    def __init__(self, device: Device, folder: Path, index: PlanIndex, name: str) -> None:
        self._device = device
        self._module = load_module(index.module)
        self.plan = index[name]
        self._engine, self._log = load_engine(folder, index, self.plan, capability=device.capability)
        self._cache = RuntimeCache(self._module, self._engine, folder / f"{self.plan.file}{CACHE_SUFFIX}")
        self._dynamic = [tensor for tensor in self.plan.inputs if -1 in tensor.shape]
        self._contexts: dict[int, Any] = {}
        self._shapes: dict[int, dict[str, Sequence[int]]] = {}  # what each context was last given

    @property
    def engine(self) -> Any:
        """The module's ``ICudaEngine``."""
        return self._engine

    def operation(self, bindings: Mapping[str, Tensor]) -> PlanOperation:
        """The plan over tensors on the device, one for each input and output.

        Raises:
            InternalError: a tensor that is missing, of another type, or of a shape that the plan does not take.
            ArtifactError: no profile covers the shapes.
        """
        for tensor in (*self.plan.inputs, *self.plan.outputs):
            if tensor.name not in bindings or not _fits(bindings[tensor.name], tensor):
                raise InternalError(f"plan {self.plan.name!r}: {bindings.get(tensor.name)} for {tensor}")
        return PlanOperation(self, {tensor.name: bindings[tensor.name].shape for tensor in self._dynamic}, bindings)

    def issue(self, shapes: Mapping[str, Sequence[int]], addresses: Mapping[str, int], stream: int) -> None:
        """Enqueue the plan.

        Raises:
            InternalError: TensorRT's reason.
        """
        context = self._context(shapes, stream)
        if self._shapes.get(id(context)) != shapes:  # never while a step is recorded: it was issued once before
            self._shape(context, shapes)
            self._shapes[id(context)] = dict(shapes)
        for name, address in addresses.items():
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(stream):
            raise InternalError(f"plan {self.plan.name!r}: {'; '.join(self._log.errors) or 'no reason given'}")

    def save(self) -> None:
        """Keep what has been compiled for this GPU beside the plan, so that the next start need not."""
        self._cache.save()

    def close(self) -> None:
        """Free contexts and engine; nothing that was issued may still run."""
        self._contexts.clear()
        self._shapes.clear()
        self._cache.close()
        self._engine = None

    def _context(self, shapes: Mapping[str, Sequence[int]], stream: int) -> Any:
        """The context of the profile for these shapes."""
        profile = self.plan.profile(**shapes)
        if profile not in self._contexts:
            context = self._cache.context()
            if context is None:
                raise InternalError(f"plan {self.plan.name!r} gives no context: {'; '.join(self._log.errors)}")
            if not context.set_optimization_profile_async(profile, stream):
                raise InternalError(f"plan {self.plan.name!r}: {'; '.join(self._log.errors)}")
            self._device.synchronize()
            self._contexts[profile] = context
        return self._contexts[profile]

    def _shape(self, context: Any, shapes: Mapping[str, Sequence[int]]) -> None:
        self._shapes.pop(id(context), None)
        for name, shape in shapes.items():
            if not context.set_input_shape(name, tuple(shape)):
                raise InternalError(f"plan {self.plan.name!r}: {'; '.join(self._log.errors)}")


class PlanOperation:
    """An `Operation`: a plan with its tensors."""

    def __init__(self, runner: PlanRunner, shapes: Mapping[str, Sequence[int]], bindings: Mapping[str, Tensor]) -> None:
        self._runner, self._shapes = runner, shapes
        self._addresses = {name: tensor.address for name, tensor in bindings.items()}

    def issue(self, stream: int) -> None:
        """See `Operation.issue`."""
        self._runner.issue(self._shapes, self._addresses, stream)


def _fits(found: Tensor, wanted: PlanTensor) -> bool:
    if wanted.dtype == "i4":  # two values a byte
        return found.dtype == "u8" and found.shape == (*wanted.shape[:-1], -(-wanted.shape[-1] // 2))
    same = len(found.shape) == len(wanted.shape)
    sizes = zip(found.shape, wanted.shape, strict=True) if same else ()
    return same and found.dtype == wanted.dtype and all(extent in {size, -1} for size, extent in sizes)
