"""Triton-lang, or stand-ins that only let kernel modules be imported.

Kernels are compiled ahead of time. Where they are only launched there is no Triton-lang, and the functions that make
the launches, which lie beside the kernels, need none.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = SimpleNamespace(constexpr=lambda value: value)

__all__ = ["cdiv", "jit", "power_of_two", "tl"]


def jit(function: Any) -> Any:
    """`triton.jit`; the function itself where there is no Triton-lang."""
    return function if triton is None else triton.jit(function)


def cdiv(size: int, block: int) -> int:
    """Blocks that cover ``size``."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(size - 1, 0).bit_length()
