"""Kernels compiled ahead of time, on any machine: Triton-lang writes cubins, and running them needs only the driver.

A kernel is compiled for its argument types, its constants and a compute capability. The result lies in a folder under a
key that covers all of these and the kernels' source, so that a stale binary is never found.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from python_backends.errors import ArtifactError, BuildError, InternalError
from python_backends.runtime.gpu.launch import Launch, Tensor

TRITON_VERSION = "3.6.0"
"""The one that kernels are written for and measured with; what a launch passes besides its arguments depends on it."""

_KERNELS = "python_backends.runtime.gpu.kernels"
_KERNEL_FOLDER = Path(__file__).parent / "kernels"
_HIDDEN_POINTERS = 2
"""Pointers behind the arguments that Triton-lang's launcher passes to every kernel (triton/backends/nvidia/driver.py):
scratch memory and the profiler's memory. Null where the kernel asks for none, and none of ours may."""
_POINTER_ALIGNMENT = 16


@dataclass(frozen=True)
class Compiled:
    """A kernel for one compute capability.

    Launch it with ``32 · num_warps`` threads, ``shared_bytes`` of dynamic shared memory and, as parameters, the
    launch's arguments except None, then ``hidden_pointers`` null pointers.
    """

    key: str
    name: str
    """Of the function in the cubin."""
    num_warps: int
    shared_bytes: int
    hidden_pointers: int
    registers: int
    """Per thread."""
    spilled_bytes: int
    """Registers that went to memory, per thread; 0 unless a configuration is a bad one."""
    cubin: bytes


class KernelCache:
    """Compiled kernels in a folder, compiled when first asked for where Triton-lang is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded: dict[str, Compiled] = {}

    def get(self, launch: Launch, capability: int) -> Compiled:
        """The compiled kernel of a launch.

        Raises:
            ArtifactError: it is not there and Triton-lang is not installed to make it, or its file is unreadable.
            BuildError: it does not compile.
        """
        key = launch_key(launch, capability)
        found = self._loaded.get(key) or self._read(key)
        if found is None:
            require_compiler(launch, capability)
            if os.environ.get("TRITON_INTERPRET"):  # this process's kernels are interpreted, so another one compiles
                with _workers(1) as pool:
                    found = pool.submit(compile_launch, launch, capability).result()
            else:
                found = compile_launch(launch, capability)
            self._write(found)
        self._loaded[key] = found
        return found

    def compile_all(
        self,
        launches: Iterable[Launch],
        capability: int,
        progress: Callable[[int, int], None] | None = None,
        processes: int | None = None,
    ) -> list[Compiled]:
        """Compile what is missing, several at once. ``progress`` is told how many of how many kernels are there.

        Returns:
            Each different kernel once, in the order of the launches.

        Raises:
            ArtifactError: Triton-lang is not installed.
            BuildError: one does not compile.
        """
        wanted = {launch_key(launch, capability): launch for launch in launches}
        missing = [key for key in wanted if key not in self._loaded and self._read(key) is None]
        done = len(wanted) - len(missing)
        if progress is not None:
            progress(done, len(wanted))
        if missing:
            require_compiler(wanted[missing[0]], capability)
            with _workers(min(len(missing), processes or os.cpu_count() or 1)) as pool:
                jobs = [pool.submit(compile_launch, wanted[key], capability) for key in missing]
                try:
                    for job in as_completed(jobs):
                        self._write(job.result())
                        done += 1
                        if progress is not None:
                            progress(done, len(wanted))
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return [self.get(launch, capability) for launch in wanted.values()]

    def _read(self, key: str) -> Compiled | None:
        """From the folder, None where it is not there."""
        try:
            facts = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            return Compiled(key=key, cubin=(self.folder / f"{key}.cubin").read_bytes(), **facts)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"{self.folder / key} cannot be read ({error}); build again with --force") from error

    def _write(self, compiled: Compiled) -> None:
        """The description last: who finds it finds the cubin."""
        facts = asdict(compiled)
        cubin = facts.pop("cubin")
        key = facts.pop("key")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, payload in ((f"{key}.cubin", cubin), (f"{key}.json", json.dumps(facts, indent=1).encode())):
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                file.write(payload)
            Path(file.name).replace(self.folder / name)
        self._loaded[key] = compiled


def launch_key(launch: Launch, capability: int) -> str:
    """What a compiled kernel is found by: SHA-256 over everything that goes into it."""
    module = launch.kernel.partition(".")[0]
    parts = (
        launch.kernel,
        source_hash(module),
        argument_types(launch),
        sorted((name, repr(value)) for name, value in launch.constants.items()),
        (launch.num_warps, launch.num_stages, capability, TRITON_VERSION),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def argument_types(launch: Launch) -> tuple[str, ...]:
    """Triton-lang's names of the arguments' types, "constexpr" for None.

    Raises:
        InternalError: an address is not aligned as the kernels assume.
    """
    types = []
    for arg in launch.args:
        if isinstance(arg, Tensor):
            if arg.address % _POINTER_ALIGNMENT:
                raise InternalError(
                    f"{launch.kernel}: address {arg.address:#x} is not {_POINTER_ALIGNMENT}-byte aligned"
                )
            types.append(f"*{arg.dtype}")
        else:
            types.append("constexpr" if arg is None else "fp32" if isinstance(arg, float) else "i32")
    return tuple(types)


@cache
def sources_hash() -> str:
    """Over the texts of all kernel modules."""
    texts = [(path.name, path.read_text(encoding="utf-8")) for path in sorted(_KERNEL_FOLDER.glob("*.py"))]
    return hashlib.sha256(repr(texts).encode()).hexdigest()


@cache
def source_hash(module: str) -> str:
    """Over the text of a kernel module and of the kernel modules that it imports."""
    texts: dict[str, str] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name not in texts:
            text = texts[name] = (_KERNEL_FOLDER / f"{name}.py").read_text(encoding="utf-8")
            pending += re.findall(rf"^from {re.escape(_KERNELS)}\.(\w+) import", text, re.MULTILINE)
    return hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()


def require_compiler(launch: Launch, capability: int) -> None:
    """Raise ArtifactError where Triton-lang is not installed in the version that kernels are written for."""
    try:
        import triton

        version = str(triton.__version__)
    except ImportError:
        version = "none"
    if version != TRITON_VERSION:
        raise ArtifactError(
            f"the build holds no kernel {launch.kernel} for compute capability {capability // 10}.{capability % 10}: "
            f"build again with `wicore build --force` for this GPU, or install triton=={TRITON_VERSION} here "
            f"(found: {version}), and it is compiled at load"
        )


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile in this process, which must not have ``TRITON_INTERPRET`` set. Needs neither a GPU nor PyTorch.

    Raises:
        BuildError: the kernel does not compile, or needs scratch memory.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = launch.kernel.rpartition(".")
    function = getattr(importlib.import_module(f"{_KERNELS}.{module}"), name)
    source = ASTSource(function, *_specialisation(function, launch))
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(log), triton.knobs.cache.scope():
        triton.knobs.cache.dir = scratch
        triton.knobs.nvidia.dump_ptxas_log = True
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        try:
            result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        except Exception as error:
            constants = dict(launch.constants)
            raise BuildError(f"{launch.kernel} {constants} for {capability}: {error}\n{log.getvalue()}") from error
        metadata, cubin = result.metadata, bytes(result.asm["cubin"])
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
        raise BuildError(f"{launch.kernel} asks for scratch memory or clusters, which launches do not provide")
    return Compiled(
        key=launch_key(launch, capability),
        name=metadata.name,
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        hidden_pointers=_HIDDEN_POINTERS,
        registers=_figure(r"Used (\d+) registers", log.getvalue()),
        spilled_bytes=_figure(r"(\d+) bytes spill stores", log.getvalue()),
        cubin=cubin,
    )


def _specialisation(function: Any, launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """(type of every parameter, values of the constants, attributes) as `ASTSource` takes them."""
    constants = dict(launch.constants)
    variables = [param.name for param in function.params if param.name not in constants]
    types = argument_types(launch)
    if len(variables) != len(types):
        raise InternalError(f"{launch.kernel}: {len(types)} arguments for the parameters {variables}")
    signature = dict.fromkeys(function.arg_names, "constexpr") | dict(zip(variables, types, strict=True))
    attributes = {
        (index,): [["tt.divisibility", _POINTER_ALIGNMENT]]
        for index, name in enumerate(function.arg_names)
        if signature[name].startswith("*")
    }
    nothing = {name: None for name, kind in zip(variables, types, strict=True) if kind == "constexpr"}
    return signature, constants | nothing, attributes


def _figure(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    return int(found.group(1)) if found else 0


def _workers(count: int) -> ProcessPoolExecutor:
    """Processes that compile; fresh ones, whatever this one has imported."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_compile_here)


def _compile_here() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
