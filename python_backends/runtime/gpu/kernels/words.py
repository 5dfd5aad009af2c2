"""A copy of a few words by a kernel, for memory of the host that is mapped into the device's."""

from __future__ import annotations

from python_backends.runtime.gpu.kernels.lang import cdiv, jit, tl
from python_backends.runtime.gpu.launch import Launch, Tensor

_BLOCK = 1024


@jit
def copy_kernel(source, target, count, BLOCK: tl.constexpr):
    """Grid (count / BLOCK,)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    tl.store(target + at, tl.load(source + at, mask=inside, other=0), mask=inside)


def copy(source: Tensor, target: Tensor) -> Launch:
    """``target[i] = source[i]``, int32 [N]."""
    return Launch(
        "words.copy_kernel", (cdiv(source.size, _BLOCK), 1, 1), (source, target, source.size), {"BLOCK": _BLOCK}
    )
