"""What the CPU can do, as far as the kernels ask."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

_NEEDED = frozenset(("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "f16c", "fma", "bmi2"))
_AMX = frozenset(("amx_tile", "amx_int8", "amx_bf16", "avx512_bf16"))


@functools.cache
def flags() -> frozenset[str]:
    """Names of the features as Linux lists them; empty elsewhere."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def missing() -> list[str]:
    """Features the kernels need and this CPU lacks, sorted."""
    return sorted(_NEEDED - flags())


def has_amx() -> bool:
    """Whether the CPU multiplies tiles of int8 and bfloat16, and nobody forbids it. Linux may still refuse them."""
    return flags() >= _AMX and "WICORE_NO_AMX" not in os.environ
