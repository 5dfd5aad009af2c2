"""The one call a session makes: which model to load, with which kernels."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import onnxruntime

from python_backends.errors import InternalError
from python_backends.runtime.kernels import cpu
from python_backends.runtime.kernels.compile import library
from python_backends.runtime.kernels.rewrite import rewrite
from python_backends.runtime.kernels.self_check import check

_STOCK = "onnxruntime"
FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
"""Of a session: where the weights of a model lie that is given as bytes."""

_log = logging.getLogger(__name__)


def accelerate(path: Path, options: onnxruntime.SessionOptions, choice: str = "auto") -> str | bytes:
    """The model at ``path`` with its quantized products exchanged for ours; the path itself where that is impossible.

    ``options`` must hold the number of intra-op threads. It gets the library, and the folder of the weights, which a
    model given as bytes needs. ``choice`` is `Config.cpu_kernels`.
    """
    compiled = _checked_library() if choice != _STOCK else None
    if compiled is None:
        return str(path)
    # With AVX-512 ONNX Runtime's attention has wider vectors than ours, and which is faster has not been measured.
    attention = cpu.variant() is cpu.Variant.AVX2
    model, exchanged = rewrite(path, options.intra_op_num_threads, attention=attention)
    if not exchanged:
        return str(path)
    options.register_custom_ops_library(str(compiled))
    options.add_session_config_entry(FOLDER_OPTION, str(path.parent))
    _log.info("%s: %d quantized products run on %s", path.name, exchanged, _instructions())
    return model


@functools.cache
def _checked_library() -> Path | None:
    """The library, if this machine can have one and it multiplies correctly."""
    variant = cpu.variant()
    if variant is None:
        _log.info("the CPU lacks %s: ONNX Runtime's kernels run", ", ".join(cpu.missing()))
        return None
    try:
        compiled = library(variant)
        check(compiled)
    except InternalError as error:
        _log.warning("ONNX Runtime's slower kernels run: %s", error.message)
        return None
    return compiled


def _instructions() -> str:
    if cpu.variant() is cpu.Variant.AVX2:
        return "own kernels (AVX2)"
    return "own kernels (AVX-512 VNNI and AMX)" if cpu.has_amx() else "own kernels (AVX-512 VNNI)"
