"""TensorRT and TensorRT-RTX, which share their Python API: the module, its log, and plans loaded as engines.

What goes wrong on the way says what to do about it. This is the one place that knows how TensorRT words its errors.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from python_backends.errors import ArtifactError
from python_backends.manifest import TENSORRT, TENSORRT_RTX
from python_backends.runtime.gpu.plans import Plan, PlanIndex

MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
"""Python module by runtime."""
_INSTALL = {
    "tensorrt": "run in NVIDIA's Triton container, or `pip install 'wicore[tensorrt]'`",
    "tensorrt_rtx": "`pip install 'wicore[tensorrt-rtx]'`",
}
_LAYERS = "Layers:"
_NO_GPU = (
    "CUDA driver version is insufficient",
    "no CUDA-capable device",
    "CUDA initialization failure",
    "cudaError 35",
)
_OTHER_VERSION = ("serialization version", "Version tag does not match", "not compatible with this version")
_OTHER_GPU = (
    "compute capability",
    "Target GPU SM",
    "generated on an incompatible",
    "not compatible with the current GPU",
)

_log = logging.getLogger(__name__)


def load_module(name: str) -> Any:
    """The module "tensorrt" or "tensorrt_rtx".

    Raises:
        ArtifactError: it is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ArtifactError(f"{name} cannot be imported ({error}); {_INSTALL[name]}") from error


def make_log(module: Any) -> Any:
    """A logger for TensorRT that keeps errors in ``errors`` and a builder's list of layers in ``layers``.

    Errors are left to the caller to raise; warnings go to the log as news for developers.
    """

    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers: list[str] = []
            self.runtime: Any = None

        def log(self, severity: Any, message: str) -> None:
            if severity in {module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR}:
                self.errors.append(message)
            elif message.startswith(_LAYERS):
                self.layers.append(message)
            elif severity == module.ILogger.WARNING:
                _log.debug("TensorRT: %s", message)

    return Log()


def load_engine(folder: Path, index: PlanIndex, plan: Plan, *, capability: int | None = None) -> tuple[Any, Any]:
    """Deserialize a plan.

    Args:
        folder: where the plan lies.
        index: the one it is in.
        plan: which.
        capability: of the GPU, 89 for 8.9, where it is known.

    Returns:
        The module's ``ICudaEngine``, and the log (`make_log`) that its errors go to; it must live as long.

    Raises:
        ArtifactError: TensorRT is missing or of another version, there is no GPU, or the plan does not fit it.
    """
    module = load_module(index.module)
    rebuild = f"rebuild it here: `wicore build CHECKPOINT --runtime {_runtime(index.module)}` with the same options"
    path = folder / plan.file
    if module.__version__ != index.version:
        raise ArtifactError(
            f"{path} was built by {index.module} {index.version}, installed is {module.__version__}; {rebuild}, "
            f"or install {index.version}"
        )
    here = f"{capability // 10}.{capability % 10}" if capability else ""
    if here and index.compute_capabilities and here not in index.compute_capabilities:
        built = ", ".join(index.compute_capabilities)
        raise ArtifactError(
            f"{path} was built for compute capability {built}, this GPU has {here}; {rebuild} and "
            f"`--compute-capability {here}`, or without that option"
        )
    log = make_log(module)
    log.runtime = module.Runtime(log)  # it must outlive its engine
    engine = log.runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ArtifactError(f"{path} cannot be loaded: {_explain(log.errors, rebuild)}")
    return engine, log


def _explain(errors: Iterable[str], rebuild: str) -> str:
    """TensorRT's errors as what to do."""
    text = " ".join(errors)
    if any(words in text for words in _NO_GPU):
        return (
            "no GPU, or an NVIDIA driver that is too old (nvidia-smi must list the GPU and CUDA 13); install one, or "
            "build for the CPU with `wicore build CHECKPOINT --runtime onnxruntime`"
        )
    if any(words in text for words in _OTHER_VERSION):
        return f"the plan is of another version of TensorRT; {rebuild}"
    if any(words in text for words in _OTHER_GPU):
        return f"the plan is for another GPU; {rebuild}"
    return f"{text or 'TensorRT gives no reason'}; {rebuild}"


def _runtime(module: str) -> str:
    return next(runtime for runtime, name in MODULES.items() if name == module)


class RuntimeCache:
    """Kernels that TensorRT-RTX compiles on its GPU when a shape is first used, kept beside the plan.

    ``tensorrt`` compiles everything while it builds and has no such cache: contexts are plain ones then.
    """

    def __init__(self, module: Any, engine: Any, path: Path) -> None:
        """Contexts take scratch memory of their own: TensorRT-RTX compiles for a shape when it meets one and does not
        say beforehand what it will need."""
        self._engine, self._path = engine, path
        self._config = engine.create_runtime_config()
        specialization = getattr(module, "DynamicShapesKernelSpecializationStrategy", None)
        if specialization is not None:  # compiled when a shape is first used, not behind a capture's back
            self._config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        self._cache = self._config.create_runtime_cache() if hasattr(self._config, "create_runtime_cache") else None
        if self._cache is not None:
            if path.exists():
                self._cache.deserialize(path.read_bytes())  # one of another driver or GPU is ignored
            self._config.set_runtime_cache(self._cache)

    def context(self) -> Any:
        """An execution context whose kernels come from the cache and go into it."""
        return self._engine.create_execution_context(self._config)

    def close(self) -> None:
        """Free what belongs to the engine."""
        self._engine = self._config = self._cache = None

    def save(self) -> None:
        """Keep what has been compiled so far. A folder that cannot be written costs time at the next start, no more."""
        if self._cache is None:
            return
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            draft.write_bytes(memoryview(self._cache.serialize()))
            draft.replace(self._path)
        except OSError as error:
            _log.warning("%s cannot be kept (%s); kernels are compiled again at the next start", self._path, error)


# --- what an engine is made of ------------------------------------------------------------------------------------


def count_layers(layers: Iterable[tuple[str, str]]) -> dict[str, int]:
    """(name, type) of an engine's layers → how many there are of each type; fused attention is ``attention``."""
    return dict(sorted(Counter("attention" if "_mha_" in name else kind for name, kind in layers).items()))


def logged_layers(log: Any) -> dict[str, int]:
    """What the builder of a plan said it is made of; the engine inspector says the same, but on a GPU alone."""
    found = [match for text in log.layers for match in re.findall(r"^Name: (.*?), LayerType: (\w+)", text, re.M)]
    return count_layers(found)


def inspect_engine(module: Any, engine: Any) -> dict[str, int]:
    """What the engine inspector says a loaded engine is made of."""
    text = engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON)
    layers = json.loads(text)["Layers"]
    return count_layers((layer["Name"], layer["LayerType"]) for layer in layers)
