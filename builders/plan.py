"""From an ONNX graph in the standard dialect to a TensorRT plan, with or without a GPU.

TensorRT's own API, because the builder's log, which tells what a plan is made of where there is no GPU to ask the
engine inspector, is otherwise out of reach; and because which of the two modules is used is a matter of the build, not
of the process.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from python_backends.errors import ArtifactError, BuildError
from python_backends.manifest import TENSORRT, file_sha256
from python_backends.runtime.gpu.engines import MODULES, load_module, logged_layers, make_log
from python_backends.runtime.gpu.plans import Plan, PlanTensor, Profile, Shape

_DTYPES = {
    "FLOAT": "fp32",
    "BF16": "bf16",
    "HALF": "fp16",
    "FP8": "fp8e4nv",
    "INT8": "i8",
    "INT4": "i4",
    "INT32": "i32",
    "INT64": "i64",
    "UINT8": "u8",
    "BOOL": "i1",
}
"""TensorRT's names of element types → ours."""


class PlanBuilder:
    """Builds plans with one module for one set of GPUs.

    Args:
        module: "tensorrt_rtx" or "tensorrt".
        capabilities: GPUs such as "8.9"; none is TensorRT-RTX's own choice, or the GPU present with ``tensorrt``.
        timing_cache: file in which ``tensorrt`` keeps what it measured from build to build. TensorRT-RTX measures
            nothing while it builds; what its plans compile on their GPU is `engines.RuntimeCache`'s matter.

    Raises:
        BuildError: the module is not installed, or does not build for such a GPU.
    """

    def __init__(self, module: str, capabilities: Sequence[str] = (), timing_cache: Path | None = None) -> None:
        try:
            self._trt = load_module(module)
        except ArtifactError as error:
            raise BuildError(f"{error.message}; or build without --plans") from error
        self.module, self.version = module, str(self._trt.__version__)
        self.capabilities = tuple(capabilities)
        self._timing_cache = timing_cache
        self._targets = [self._target(capability) for capability in capabilities]

    def build(self, onnx: Path, target: Path, profiles: Sequence[Profile]) -> Plan:
        """Build the graph ``onnx`` into the plan file ``target``.

        Raises:
            BuildError: TensorRT refuses the graph, with its reasons.
            OSError: the disk is full.
        """
        began = time.monotonic()
        log = make_log(self._trt)
        builder = self._trt.Builder(log)
        network = builder.create_network(self._network_flags())
        parser = self._trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(onnx)):
            reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise BuildError(f"{self.module} {self.version} cannot read {onnx.name}: {reasons}")
        config = self._config(builder, profiles)
        with self._timed(config):
            built = builder.build_serialized_network(network, config)
        if built is None:
            raise BuildError(f"{self.module} {self.version} cannot build {onnx.stem}: {_reasons(log.errors)}")
        with target.open("wb") as file:
            file.write(built)
        return Plan(
            name=onnx.stem,
            file=target.name,
            onnx_sha256=file_sha256(onnx),
            inputs=tuple(_tensor(network.get_input(index)) for index in range(network.num_inputs)),
            outputs=tuple(_tensor(network.get_output(index)) for index in range(network.num_outputs)),
            profiles=tuple(profiles),
            network_layers=_network_layers(network),
            engine_layers=logged_layers(log),
            num_bytes=target.stat().st_size,
            seconds=round(time.monotonic() - began, 3),
        )

    def _target(self, capability: str) -> Any:
        """A compute capability as the module names it."""
        if not re.fullmatch(r"\d+\.\d", capability):
            raise BuildError(f"compute capability {capability!r} is not of the form 8.9")
        kinds = getattr(self._trt, "ComputeCapability", None)
        if kinds is None:
            raise BuildError(f"{self.module} builds for the GPU present; leave --compute-capability out")
        name = f"SM{capability.replace('.', '')}"
        if not hasattr(kinds, name):
            known = sorted(kind[2:-1] + "." + kind[-1] for kind in kinds.__members__ if kind.startswith("SM"))
            raise BuildError(
                f"{self.module} {self.version} does not build for compute capability {capability} alone; it names "
                f"{', '.join(known)}. Leave --compute-capability out: plans of its own choice run on later GPUs too"
            )
        return getattr(kinds, name)

    def _network_flags(self) -> int:
        """Strongly typed, which TensorRT-RTX and later versions always are."""
        flag = getattr(self._trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)

    def _config(self, builder: Any, profiles: Sequence[Profile]) -> Any:
        config = builder.create_builder_config()
        config.profiling_verbosity = self._trt.ProfilingVerbosity.DETAILED
        if self._targets:
            config.num_compute_capabilities = len(self._targets)
            for index, target in enumerate(self._targets):
                config.set_compute_capability(target, index)
        for profile in profiles:
            made = builder.create_optimization_profile()
            for name, bounds in profile.shapes.items():
                made.set_shape(name, *bounds)
            config.add_optimization_profile(made)
        return config

    @contextlib.contextmanager
    def _timed(self, config: Any) -> Iterator[None]:
        """Let a build use what earlier ones measured, and keep what it measures."""
        if self._timing_cache is None or self.module != MODULES[TENSORRT]:
            yield
            return
        known = self._timing_cache.read_bytes() if self._timing_cache.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=True)
        yield
        cache = config.get_timing_cache()
        if cache is not None:
            self._timing_cache.write_bytes(cache.serialize())


def _tensor(tensor: Any) -> PlanTensor:
    shape: Shape = tuple(int(extent) for extent in tensor.shape)
    return PlanTensor(tensor.name, _DTYPES[tensor.dtype.name], shape)


def _network_layers(network: Any) -> dict[str, int]:
    kinds = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    kinds["ATTENTION"] = kinds.pop("ATTENTION_OUTPUT", 0)  # one attention is a pair of layers
    kinds.pop("ATTENTION_INPUT", None)
    return {kind: count for kind, count in sorted(kinds.items()) if count}


def _reasons(errors: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(errors)) or "no reason given"
