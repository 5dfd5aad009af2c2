"""Getting what the peers need, into a folder of its own and only when they are asked for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from python_backends.errors import BuildError

REQUIREMENTS = ("llama-cpp-python==0.3.36", "gguf==0.19.0", "diskcache==5.6.3")


def install_llama(folder: Path) -> Path:
    """Install llama.cpp's Python package where it is not yet; compiling it takes minutes and needs a C++ compiler.

    Raises:
        BuildError: it cannot be installed.
    """
    if not (folder / "llama_cpp").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--target", folder, *REQUIREMENTS], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise BuildError(
                f"cannot install llama.cpp ({REQUIREMENTS[0]}): {reason}; it needs CMake and a C++ compiler, "
                "or leave it out with --without llama.cpp"
            )
    return folder


def require_torch() -> None:
    """Raise where transformers cannot run.

    Raises:
        BuildError: PyTorch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise BuildError("transformers needs PyTorch: `pip install 'wicore[train]'`, or --without transformers")
