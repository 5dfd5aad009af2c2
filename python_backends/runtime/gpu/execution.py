"""Plans that run: contexts by profile over one scratch buffer, and executions that a device issues in order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from python_backends.errors import InternalError
from python_backends.runtime.gpu.engines import RuntimeCache, load_engine
from python_backends.runtime.gpu.launch import Device, Tensor
from python_backends.runtime.gpu.plans import Plan, PlanIndex

_ALLOWED = {"i4": "u8"}
"""Element types of plans that tensors name otherwise: two values a byte."""


class LoadedPlan:
    """One plan on the GPU. A context belongs to one profile; all share their scratch memory, since they run in turns.

    Args:
        device: whose memory and stream it uses.
        folder: where the plan lies, and where kernels that it compiles are kept.
        index: the one it is in.
        plan: which.

    Raises:
        ArtifactError: see `load_engine`.
        ConfigError: the GPU's memory does not suffice.
    """

    def __init__(self, device: Device, folder: Path, index: PlanIndex, plan: Plan) -> None:
        self.plan = plan
        self._engine = load_engine(folder, index, plan, capability=device.capability)
        self._cache = RuntimeCache(self._engine, folder / f"{plan.file}.kernels")
        self._scratch = device.allocate("u8", max(1, int(self._engine.device_memory_size_v2)))
        self._contexts: dict[int, Any] = {}

    def execution(self, tensors: Mapping[str, Tensor]) -> Execution:
        """A run over these inputs and outputs.

        Raises:
            ArtifactError: no profile takes such shapes.
            InternalError: a tensor is missing or of another type.
        """
        for wanted in (*self.plan.inputs, *self.plan.outputs):
            found = tensors.get(wanted.name)
            if found is None or found.dtype != _ALLOWED.get(wanted.dtype, wanted.dtype):
                raise InternalError(f"plan {self.plan.name!r}: {wanted.name} must be {wanted.dtype}, not {found}")
        dynamic = {tensor.name: tensors[tensor.name].shape for tensor in self.plan.inputs if -1 in tensor.shape}
        return Execution(self, self.plan.profile(**dynamic), tensors, dynamic)

    def context(self, profile: int, stream: int) -> Any:
        """The context of a profile, made when it is first asked for."""
        if profile not in self._contexts:
            context = self._cache.context(self._scratch.address, self._scratch.num_bytes)
            if not context.set_optimization_profile_async(profile, stream):
                raise InternalError(f"plan {self.plan.name!r} has no profile {profile}")
            self._contexts[profile] = context
        return self._contexts[profile]

    def save_kernels(self) -> None:
        """Keep the kernels that were compiled so far for the next start."""
        self._cache.save()


class Execution:
    """An `Operation`: a plan with its shapes and addresses."""

    def __init__(
        self, loaded: LoadedPlan, profile: int, tensors: Mapping[str, Tensor], dynamic: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._loaded, self._profile = loaded, profile
        self._addresses = {name: tensor.address for name, tensor in tensors.items()}
        self._dynamic = dict(dynamic)

    def issue(self, stream: int) -> None:
        """See `Operation.issue`.

        Raises:
            InternalError: TensorRT refuses.
        """
        context = self._loaded.context(self._profile, stream)
        ready = all(context.set_input_shape(name, shape) for name, shape in self._dynamic.items())
        ready = ready and all(context.set_tensor_address(name, address) for name, address in self._addresses.items())
        if not ready or not context.execute_async_v3(stream):
            raise InternalError(f"plan {self._loaded.plan.name!r} cannot be run with shapes {self._dynamic}")
