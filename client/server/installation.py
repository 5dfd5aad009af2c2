"""Where `tritonserver` is and what it needs around it.

A `tritonserver` on PATH (the NGC container) is complete. The one in the `nvidia-pytriton` wheel needs its libraries
named and the Python backend's stub of the running Python version beside the backend; the wheel keeps the stubs of all
versions elsewhere, so a folder of links in the user's cache puts them together and the wheel stays as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from python_backends.errors import ServerStartError

STUB = "triton_python_backend_stub"
LIBRARIES = "nvidia_pytriton.libs"


@dataclass(frozen=True)
class Installation:
    """A `tritonserver` that can be started. Folders are None where its own defaults are right."""

    binary: Path
    libraries: Path | None = None
    backends: Path | None = None
    caches: Path | None = None

    def environment(self) -> dict[str, str]:
        """The environment to start it in.

        The Python backend's stub ignores PYTHONPATH and takes the environment whose `python3` is first on PATH, so the
        running interpreter's folder goes to the front.
        """
        environment = dict(os.environ)
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
        if self.libraries:
            # The stub links to libpython: the running interpreter's, not another one of the same minor version.
            python = sysconfig.get_config_var("LIBDIR")
            found = [environment.get("LD_LIBRARY_PATH"), python]
            environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(self.libraries), *filter(None, found)])
        return environment


def find() -> Installation:
    """The `tritonserver` on PATH, else the one in the wheel.

    Raises:
        ServerStartError: neither is there, or the wheel has no stub for this Python.
    """
    on_path = shutil.which("tritonserver")
    return Installation(Path(on_path).resolve()) if on_path else _in_wheel()


def check_environment(installation: Installation) -> None:
    """See that the stages' package can be imported where the stub will look for it.

    Raises:
        ServerStartError: it cannot.
    """
    environment = installation.environment()
    python = shutil.which("python3", path=environment["PATH"])
    command = [python or "python3", "-c", "import python_backends"]
    try:
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    except OSError as error:
        raise ServerStartError(f"Triton's stages need a python3 on PATH: {error.strerror}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ServerStartError(
            f"{python} cannot import WiCore's stages ({reason}); install WiCore there with `{python} -m pip install .`"
        )


def wheel_libraries() -> Path | None:
    """Folder of the shared libraries that the wheel brings; None where it is not installed."""
    package = _wheel_package()
    return package.parent / LIBRARIES if package else None


def _wheel_package() -> Path | None:
    spec = importlib.util.find_spec("pytriton")
    return Path(spec.origin).parent if spec and spec.origin else None


def _in_wheel() -> Installation:
    package = _wheel_package()
    if package is None:
        raise ServerStartError(
            "no tritonserver on PATH and no wheel with one; run `pip install nvidia-pytriton`, or start inside "
            "NVIDIA's Triton container"
        )
    triton = package / "tritonserver"
    binary = triton / "bin" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / version / STUB
    if not stub.exists():
        offered = ", ".join(sorted(path.name for path in stub.parents[1].glob("3.*"))) or "none"
        raise ServerStartError(f"{package.name} has no Triton stub for Python {version}; it has: {offered}")
    backends = _stage(triton / "backends" / "python", stub)
    return Installation(binary, package.parent / LIBRARIES, backends, triton / "caches")


def cache_folder() -> Path:
    """Where WiCore keeps what it can make again: `$XDG_CACHE_HOME/wicore`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wicore"


def _stage(backend: Path, stub: Path) -> Path:
    """A backend folder of links to the wheel's Python backend and one of its stubs.

    Made aside and renamed, so that servers that start at the same time find it whole.
    """
    key = hashlib.sha256(f"{backend}\0{stub}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"backends-{key}"
    wanted = {path.name: path for path in [*backend.iterdir(), stub] if path.is_file()}
    if _is_staged(folder / "python", wanted):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".backends-"))
        (made / "python").mkdir()
        for name, target in wanted.items():
            (made / "python" / name).symlink_to(target)
        if folder.exists():  # links of a wheel that has been replaced
            folder.rename(made / "replaced")
        made.rename(folder)
        shutil.rmtree(folder / "replaced", ignore_errors=True)
    except OSError as error:
        if not _is_staged(folder / "python", wanted):
            raise ServerStartError(
                f"cannot write {folder.parent}: {error.strerror}; name a folder you can write in XDG_CACHE_HOME"
            ) from error
    return folder


def _is_staged(folder: Path, wanted: dict[str, Path]) -> bool:
    try:
        return {path.name: path.readlink() for path in folder.iterdir()} == wanted
    except OSError:
        return False
