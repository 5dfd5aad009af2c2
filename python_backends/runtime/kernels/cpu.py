"""What the CPU can do, as far as the kernels ask."""

from __future__ import annotations

import enum
import functools
import os
import platform
from pathlib import Path


class Variant(enum.StrEnum):
    """Instructions that the library can be compiled for; the names are those of the folders in src/."""

    AVX512 = "avx512"
    """AVX-512 with VNNI, and AMX where it is there."""
    AVX2 = "avx2"


# The best first.
_NEEDED = {
    Variant.AVX512: frozenset(("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "f16c", "fma", "bmi2")),
    Variant.AVX2: frozenset(("avx2", "f16c", "fma")),
}
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


def variant() -> Variant | None:
    """The fastest kernels that this CPU can run and nobody forbids; None where it can run none."""
    for one, needed in _NEEDED.items():
        if flags() >= needed and not (one is Variant.AVX512 and "WICORE_NO_AVX512" in os.environ):
            return one
    return None


def missing() -> list[str]:
    """Features that the least of the variants needs and this CPU lacks, sorted."""
    return sorted(_NEEDED[Variant.AVX2] - flags())


def has_amx() -> bool:
    """Whether the CPU multiplies tiles of int8 and bfloat16, and nobody forbids it. Linux may still refuse them."""
    return variant() is Variant.AVX512 and flags() >= _AMX and "WICORE_NO_AMX" not in os.environ
