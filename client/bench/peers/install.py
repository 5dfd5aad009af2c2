"""Getting what the peers need, into a folder of its own and only when they are asked for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from python_backends.errors import BuildError

REQUIREMENTS = ("llama-cpp-python==0.3.36", "gguf==0.19.0", "diskcache==5.6.3")
CMAKE_ARGS = "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
"""For this machine's own processor: AVX-512, VNNI and AMX where it has them."""
# GCC 12's _tile_loadconfig tells the compiler that eight bytes of its argument are read. The stores of the other 56 are
# then dropped as dead, and llama.cpp's AMX products end in a segmentation fault.
TILE_CONFIG = """\
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
"""


def install_llama(folder: Path) -> Path:
    """Install llama.cpp's Python package where it is not yet; compiling it takes minutes and needs a C++ compiler.

    Raises:
        BuildError: it cannot be installed.
    """
    if not any(folder.glob("llama_cpp/lib/*llama*")):
        folder.mkdir(parents=True, exist_ok=True)
        header = folder.resolve() / "tile_config.h"
        header.write_text(TILE_CONFIG, encoding="utf-8")
        flags = f"{os.environ.get('CXXFLAGS', '')} -include {header}".strip()
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*pip, "--no-binary", "llama-cpp-python", "--upgrade", "--target", folder, *REQUIREMENTS],
            env={"CMAKE_ARGS": CMAKE_ARGS, **os.environ, "CXXFLAGS": flags},
            capture_output=True,
            text=True,
            check=False,
        )
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
