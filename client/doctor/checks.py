"""The checks. Each is quick, changes nothing that it does not put back, and gives a `Finding` whatever happens."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import mmap
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from client.doctor.findings import Finding
from client.gateway.gpu import GpuMeter
from client.server import installation
from client.server.process import SHARED_MEMORY
from python_backends.config import Config
from python_backends.errors import ServerStartError, WiCoreError
from python_backends.runtime.kernels import cpu

PYTHONS = ((3, 11), (3, 12))
SHM_BYTES = 512 * 2**20
"""Python stages hand tensors on through /dev/shm: 1 MiB each at first, growing with pictures in flight."""
DISK_BYTES = 64 * 2**20
SLOW_DISK = 0.5e9
"""Bytes a second below which reading kept KV back is hardly faster than computing it."""
FEWEST_GB = 4.0
FEWEST_FILES = 4096
TENSORRT = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
"""Module → extra of WiCore that installs it."""


def python() -> Finding:
    """The interpreter, for which Triton's Python backend must have a stub."""
    version = sys.version_info[:2]
    found = f"Python {platform.python_version()}"
    if version in PYTHONS:
        return Finding("python", "ok", found)
    return Finding("python", "error", found, "install Python 3.11 or 3.12 and WiCore in an environment of it")


def triton() -> Finding:
    """tritonserver, and whether its stages will find WiCore."""
    try:
        found = installation.find()
        installation.check_environment(found)
    except ServerStartError as error:
        return Finding("triton", "error", "no usable tritonserver", error.message)
    done = subprocess.run(
        [found.binary, "--help"], env=found.environment(), capture_output=True, text=True, check=False, timeout=60
    )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "error while loading" in line]
    if lines:
        advice = "a library that it needs is missing; reinstall nvidia-pytriton, or use NVIDIA's container"
        return Finding("triton", "error", lines[0], advice)
    where = "nvidia-pytriton " + importlib.metadata.version("nvidia-pytriton") if found.libraries else "on PATH"
    return Finding("triton", "ok", f"tritonserver ({where})")


def gpu() -> Finding:
    """GPU and driver, from NVML."""
    reading = GpuMeter().read()
    if reading is not None:
        import pynvml

        names = [pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))]
        driver = pynvml.nvmlSystemGetDriverVersion()
        memory = f"{reading.memory_total_bytes / 1e9:.0f} GB"
        return Finding("gpu", "ok", f"{names[0]}, {memory} in all, driver {driver}")
    if Path("/proc/driver/nvidia/version").exists():
        if importlib.util.find_spec("pynvml") is None:
            return Finding("gpu", "warning", "a driver, but nothing to ask it with", "pip install nvidia-ml-py")
        return Finding("gpu", "warning", "a driver that does not answer", "run nvidia-smi and follow what it says")
    if _nvidia_on_bus():
        return Finding("gpu", "warning", "an NVIDIA GPU without a driver", "install NVIDIA's driver, 570 or later")
    return Finding("gpu", "ok", "no NVIDIA GPU; models run on the CPU")


def _nvidia_on_bus() -> bool:
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        kind = vendor.with_name("class")
        try:
            if vendor.read_text().strip() == "0x10de" and kind.read_text().startswith("0x03"):
                return True
        except OSError:
            continue
    return False


def tensorrt() -> Finding:
    """TensorRT's flavours; of use with a GPU only."""
    found = [f"{module} {_version(module)}" for module in TENSORRT if importlib.util.find_spec(module)]
    if found:
        return Finding("tensorrt", "ok", ", ".join(found))
    if GpuMeter().read() is None:
        return Finding("tensorrt", "ok", "none, and no GPU to use it")
    return Finding(
        "tensorrt",
        "warning",
        "none, but a GPU",
        "pip install 'wicore[tensorrt-rtx]' or 'wicore[tensorrt]', or for ONNX Runtime on the GPU 'wicore[cuda]'",
    )


def _version(module: str) -> str:
    names = importlib.metadata.packages_distributions().get(module, [])
    return importlib.metadata.version(names[0]) if names else "(version unknown)"


def cpu_features() -> Finding:
    """Instructions that the kernels for quantized weights want."""
    lacking = cpu.missing()
    if not lacking:
        return Finding("cpu-features", "ok", "AVX-512 VNNI" + (" and AMX" if cpu.has_amx() else ""))
    advice = "nothing is wrong: ONNX Runtime's kernels run instead of WiCore's, which are faster"
    return Finding("cpu-features", "warning", f"the CPU lacks {', '.join(lacking)}", advice)


def compiler() -> Finding:
    """A C++ compiler, for the CPU kernels."""
    name = os.environ.get("CXX") or "c++"
    path = shutil.which(name) or shutil.which("g++") or shutil.which("clang++")
    if path:
        return Finding("compiler", "ok", path)
    if cpu.missing():
        return Finding("compiler", "ok", "none, and this CPU has no use for one")
    advice = "install one (Debian, Ubuntu: apt-get install g++); until then ONNX Runtime's slower kernels run"
    return Finding("compiler", "warning", "no C++ compiler", advice)


def memory() -> Finding:
    """Memory that is free."""
    free = psutil.virtual_memory().available / 1e9
    if free >= FEWEST_GB:
        return Finding("memory", "ok", f"{free:.1f} GB free")
    advice = "end other programs, or serve a smaller model in int4 with a smaller max_context_length"
    return Finding("memory", "warning", f"{free:.1f} GB free", advice)


def shared_memory() -> Finding:
    """/dev/shm, small in containers."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError as error:
        return Finding("shared-memory", "error", f"{SHARED_MEMORY}: {error.strerror}", "mount a tmpfs there")
    if free >= SHM_BYTES:
        return Finding("shared-memory", "ok", f"{free / 2**20:,.0f} MiB free in {SHARED_MEMORY}")
    advice = "start the container with --shm-size=2g (Kubernetes: an emptyDir of medium Memory on /dev/shm)"
    return Finding("shared-memory", "error", f"{free / 2**20:,.0f} MiB free in {SHARED_MEMORY}", advice)


def disk(folder: Path) -> Finding:
    """How fast the disk of the KV tier (or else of the cache folder) is read, past the page cache where it lets us."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    try:
        speed, direct = _read_speed(there)
    except OSError as error:
        return Finding("disk", "error", f"{folder}: {error.strerror}", "name a folder you can write, with free space")
    found = f"{speed / 1e9:.2f} GB/s read from {folder}" + ("" if direct else " (through the page cache)")
    if speed >= SLOW_DISK:
        return Finding("disk", "ok", found)
    return Finding("disk", "warning", found, "put nvme_path on a local NVMe disk, or leave the tier on disk out")


def _read_speed(folder: Path) -> tuple[float, bool]:
    piece = mmap.mmap(-1, 4 * 2**20)  # page-aligned, as O_DIRECT wants it
    handle, name = tempfile.mkstemp(dir=folder, prefix=".wicore-doctor-")
    try:
        for _ in range(DISK_BYTES // len(piece)):
            os.write(handle, os.urandom(2**20) * 4)
        os.fsync(handle)
        os.close(handle)
        try:
            handle, direct = os.open(name, os.O_RDONLY | os.O_DIRECT), True
        except OSError:
            handle, direct = os.open(name, os.O_RDONLY), False
        begin = time.perf_counter()
        while os.readv(handle, [piece]):
            pass
        return DISK_BYTES / (time.perf_counter() - begin), direct
    finally:
        os.close(handle)
        Path(name).unlink()
        piece.close()


def ports(numbers: tuple[int, ...]) -> Finding:
    """Whether the ports of the server are free."""
    taken = [number for number in numbers if number and not _is_free(number)]
    if not taken:
        return Finding("ports", "ok", f"{', '.join(map(str, numbers))} are free")
    advice = (
        "unless WiCore runs already, end what listens there (ss -ltnp), or choose others: --http-port, --grpc-port, "
        "--metrics-port, server_port"
    )
    return Finding("ports", "warning", f"taken: {', '.join(map(str, taken))}", advice)


def _is_free(number: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", number))
        except OSError:
            return False
        return True


def open_files() -> Finding:
    """How many files and connections a process may hold."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard >= FEWEST_FILES:
        return Finding("open-files", "ok", "no limit" if hard == resource.RLIM_INFINITY else f"up to {hard:,}")
    advice = "raise it: ulimit -Hn 65536, LimitNOFILE= of systemd, --ulimit nofile=65536 of Docker"
    return Finding("open-files", "warning", f"up to {hard:,}", advice)


def configuration(read: Callable[[], Config]) -> Finding:
    """The configuration that a server would read."""
    try:
        read()
    except WiCoreError as error:
        return Finding("configuration", "error", "it cannot be used", error.message)
    return Finding("configuration", "ok", "valid")


def repository(folder: Path) -> Finding:
    """What is built there."""
    from python_backends import manifest

    if not (folder / manifest.MANIFEST_NAME).exists():
        advice = f"wicore build CHECKPOINT --repository {folder}, or wicore up CHECKPOINT"
        return Finding("repository", "warning", f"nothing is built in {folder}", advice)
    try:
        built = manifest.load(folder)
    except WiCoreError as error:
        return Finding("repository", "error", f"{folder} cannot be served", error.message)
    return Finding("repository", "ok", f"{built.name} in {built.precision} for {built.runtime}")


def run_machine() -> list[Finding]:
    """The checks of the machine itself."""
    return [python(), triton(), gpu(), tensorrt(), cpu_features(), compiler(), memory(), shared_memory(), open_files()]


def run_all(folder: Path, read: Callable[[], Config]) -> list[Finding]:
    """Every check."""
    checked = configuration(read)
    config = read() if checked.level == "ok" else Config()
    cache = Path(config.nvme_path).expanduser() if config.nvme_path else installation.cache_folder()
    return [
        *run_machine(),
        disk(cache),
        ports((8000, 8001, 8002, config.server_port)),
        checked,
        repository(folder),
    ]
