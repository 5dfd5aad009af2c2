"""Sessions of ONNX Runtime: on the CPU, or on a GPU through its CUDA provider."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import onnxruntime
import psutil

from python_backends.errors import ArtifactError
from python_backends.runtime.kernels import accelerate
from python_backends.runtime.kernels.loading import FOLDER_OPTION

CPU, CUDA = "cpu", "cuda"
"""Where a session runs, and where its caches lie; ONNX Runtime's names of the devices."""
_CUDA_PROVIDER, _CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"
_CUDA_OPTIONS = {
    "device_id": "0",
    "arena_extend_strategy": "kSameAsRequested",  # what steps do not need is the caches'
    "cudnn_conv_algo_search": "HEURISTIC",
    "use_tf32": "0",  # norms, masses and fp32 builds are float32
    "sdpa_kernel": "3",  # flash or memory-efficient attention: cuDNN's prepares a plan for every length
}
_LIBRARIES = ("cudart", "nvJitLink", "cublasLt", "cublas", "curand", "cufft", "nvrtc", "cudnn")
"""What the CUDA provider links to, in the order of their own needs."""
_CPU_FROM = (1, 32)
"""Version of ONNX Runtime whose attention on the CPU takes padded chunks; its GPU wheels lag behind."""
Made = TypeVar("Made")

_log = logging.getLogger(__name__)


def open_on(wanted: str, precision: str, make: Callable[[str], Made]) -> Made:
    """``make(CUDA)`` or ``make(CPU)``, as `Config.execution_provider` has it ("auto": the GPU where there is one).

    Raises:
        ArtifactError: the GPU is asked for, or the precision needs one, and it cannot be used; says what to install.
    """
    missing = "execution_provider is cpu" if wanted == CPU else missing_for_cuda()
    if not missing:
        try:
            return make(CUDA)
        except ArtifactError as error:  # libraries that cannot be loaded show when a session is made
            if wanted == CUDA:
                raise
            missing = error.message
    if wanted == CUDA:
        raise ArtifactError(f"execution_provider is cuda, and {missing}")
    if precision == "bf16":
        raise ArtifactError(
            f"this build is in bf16, which ONNX Runtime computes on GPUs alone, and {missing}; for the CPU build with "
            "--precision fp16, int8 or int4"
        )
    found = onnxruntime.__version__
    if tuple(int(part) for part in found.split(".")[:2]) < _CPU_FROM:
        raise ArtifactError(
            f"ONNX Runtime {found} is too old for the CPU: its attention does not know padded chunks. Run `pip install "
            f"'onnxruntime>={'.'.join(map(str, _CPU_FROM))}'`, or use a GPU ({missing})"
        )
    if wanted != CPU and _CUDA_PROVIDER in onnxruntime.get_available_providers():
        _log.warning("ONNX Runtime runs on the CPU: %s", missing)
    return make(CPU)


def missing_for_cuda() -> str:
    """Why the CUDA provider cannot be used here, and what to do about it; empty where nothing is seen to be missing."""
    if getattr(onnxruntime, "cuda_version", ""):
        _load_libraries()
    if _CUDA_PROVIDER not in onnxruntime.get_available_providers():
        return (
            "this ONNX Runtime has no CUDA provider; run `pip install 'wicore[cuda]'`, `pip uninstall -y onnxruntime` "
            "and `pip install --force-reinstall --no-deps onnxruntime-gpu`, as both wheels fill the same folder"
        )
    try:
        from python_backends.runtime.gpu.cuda import driver_fault
    except ImportError:
        return "CUDA's bindings (cuda-python) are not installed; run `pip install 'wicore[cuda]'`"
    return driver_fault()


def open_session(
    path: Path, provider: str, num_threads: int, cpu_kernels: str, *, kernel_fusion: bool, model: bytes | None = None
) -> onnxruntime.InferenceSession:
    """A session over the model at ``path``, or over ``model``, whose weights lie where those of ``path`` do.

    Raises:
        ArtifactError: it is missing or corrupt, or the provider cannot be used.
    """
    options = onnxruntime.SessionOptions()
    if not kernel_fusion:  # our kernels run whole layers, and ONNX Runtime fuses above its basic level
        cpu_kernels = "onnxruntime"
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = num_threads or psutil.cpu_count(logical=False) or 1
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Triton's processes share the cores. With a busy neighbour, threads that spin made a 1B int4 decode step take
    # 55 to 240 ms instead of 38; alone they gain a tenth at most.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_mem_pattern = False  # a pattern is kept for every shape seen, and chunk shapes are many
    if not path.is_file():
        raise ArtifactError(rebuild(path, "it is missing"))
    if model is not None:
        options.add_session_config_entry(FOLDER_OPTION, str(path.parent))
    if provider == CUDA:
        return _on_cuda(path, model or str(path), options)
    try:
        source = model or accelerate(path, options, cpu_kernels)
        return onnxruntime.InferenceSession(source, options, providers=[_CPU_PROVIDER])
    except Exception as error:  # the module's exceptions share no base class of their own
        raise ArtifactError(rebuild(path, f"it cannot be loaded ({error})")) from error


def rebuild(path: Path, what: str) -> str:
    """A message that ends in what to do."""
    return f"{path}: {what}; rebuild the model repository with `wicore build CHECKPOINT --force`"


def _on_cuda(path: Path, source: Any, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    providers = [(_CUDA_PROVIDER, _CUDA_OPTIONS), _CPU_PROVIDER]
    try:
        # Without ``enable_fallback=0`` a provider that fails is left out with a line on the standard output.
        session = onnxruntime.InferenceSession(source, options, providers=providers, enable_fallback=0)
        if _CUDA_PROVIDER in session.get_providers():
            return session
        what = "its provider was left out"
    except Exception as error:  # the module's exceptions share no base class of their own
        what = str(error)
    if absent := _absent_libraries():
        what = f"{', '.join(absent)} cannot be loaded"
    raise ArtifactError(
        f"{path}: ONNX Runtime cannot run it on the GPU ({what}); it needs the libraries of CUDA {_cuda_major()} and "
        "cuDNN 9: `pip install 'onnxruntime-gpu[cuda,cudnn]' nvidia-cublas`. If they are there, rebuild the model "
        "repository with `wicore build CHECKPOINT --force`, or set execution_provider to cpu"
    )


def _cuda_major() -> str:
    """Of the CUDA that ONNX Runtime was built with."""
    return str(getattr(onnxruntime, "cuda_version", "") or "13").partition(".")[0]


def _absent_libraries() -> list[str]:
    """Those that the provider links to and that the loader does not find."""
    absent = []
    for name, version in (("cublasLt", _cuda_major()), ("cublas", _cuda_major()), ("curand", "10"), ("cudnn", "9")):
        try:
            ctypes.CDLL(f"lib{name}.so.{version}")
        except OSError:
            absent.append(f"lib{name}.so.{version}")
    return absent


def _load_libraries() -> None:
    """Load NVIDIA's libraries from whatever folder of ``sys.path`` pip put them in: the provider links to them by name.

    ONNX Runtime's own `preload_dlls` looks beside its package alone; it is called behind, for what it does besides.
    """
    for name in _LIBRARIES:
        for folder in sys.path:
            for path in sorted(Path(folder).glob(f"nvidia/*/lib/lib{name}.so.*")):
                with contextlib.suppress(OSError):
                    ctypes.CDLL(str(path))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    if said.getvalue():
        _log.info("onnxruntime: %s", " ".join(said.getvalue().split()))
