"""Compiles the library once per machine, compiler and version of the sources, into the user's cache."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from python_backends.errors import InternalError
from python_backends.runtime.kernels.cpu import Variant

_SOURCES = Path(__file__).parent / "src"
_COMPILERS = ("g++", "clang++", "c++")
_OPTIONS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 finds some in its own intrinsics
    *("-mavx2", "-mf16c", "-mfma"),
)
_VARIANT_OPTIONS = {
    Variant.AVX2: (),
    Variant.AVX512: ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mbmi2"),
}
_AMX_OPTIONS = ("-mamx-tile", "-mamx-int8", "-mamx-bf16", "-mavx512bf16")
_AMX_SOURCES = frozenset(("amx_tiles.cc", "amx_integer_gemm.cc", "float_gemm.cc"))
_SECONDS = 120


def library(variant: Variant) -> Path:
    """The library compiled for the instructions of ``variant``; compiled now where the cache has none that fits.

    Raises:
        InternalError: no compiler, or one that fails; the message says what to do.
    """
    compiler = _compiler()
    folder = kernel_folder()
    path = folder / f"kernels-{variant}-{_key(compiler)}.so"
    if path.is_file() and _ours(path):
        return path
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = _compile(compiler, variant, Path(scratch))
        os.replace(built, path)  # another process may do the same: either file will do
    return path


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else _COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise InternalError("there is no C++ compiler; install g++ or clang++, or name one in CXX")


@functools.cache
def _key(compiler: str) -> str:
    """What the library is made of, as a short hash."""
    digest = hashlib.sha256()
    options = [option for of_variant in _VARIANT_OPTIONS.values() for option in of_variant]
    for part in (compiler, _run([compiler, "--version"]), *_OPTIONS, *options, *_AMX_OPTIONS):
        digest.update(part.encode() + b"\0")
    for source in sorted(path for path in _SOURCES.rglob("*") if path.is_file()):
        digest.update(str(source.relative_to(_SOURCES)).encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compile(compiler: str, variant: Variant, folder: Path) -> Path:
    """Every source on its own, several at a time, and the library from them."""
    sources = [*_SOURCES.glob("*.cc"), *(_SOURCES / variant).glob("*.cc")]

    def work(source: Path) -> str:
        amx = variant is Variant.AVX512 and source.name in _AMX_SOURCES
        options = [*_OPTIONS, *_VARIANT_OPTIONS[variant], *(_AMX_OPTIONS if amx else ())]
        target = folder / f"{source.stem}.o"
        _run([compiler, f"-I{_SOURCES}", *options, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(work, sorted(sources)))
    library = folder / "kernels.so"
    _run([compiler, "-shared", "-pthread", *objects, "-o", str(library)])
    return library


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InternalError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise InternalError(f"{command[0]} fails: {done.stderr.strip()[-2000:]}")
    return done.stdout


def kernel_folder() -> Path:
    """A folder that only this user can write: what lies there is loaded as code."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wicore" / "kernels"
    for folder in (home, Path(tempfile.gettempdir()) / f"wicore-{os.geteuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if _ours(folder) and os.access(folder, os.W_OK):
            return folder
    raise InternalError("no folder to keep compiled kernels in; set XDG_CACHE_HOME to one that can be written")


def _ours(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
