"""The device that kernel tests run on: the interpreter, or with ``WICORE_KERNEL_TESTS=cuda`` the GPU.

On the GPU all memory is mapped host memory, which both sides see at one address, so that the same tests read and write
it directly.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from python_backends.runtime.gpu.interpreter import InterpreterDevice
from python_backends.runtime.gpu.launch import ALIGNMENT, Launch, Tensor

if TYPE_CHECKING:
    from python_backends.runtime.gpu.cuda import CudaDevice

_KERNELS = Path(tempfile.gettempdir()) / "wicore-test-kernels"
_ON_GPU = os.environ.get("WICORE_KERNEL_TESTS") == "cuda"


def kernel_device() -> Any:
    """A fresh device."""
    return _mapped_device() if _ON_GPU else InterpreterDevice()


def _mapped_device() -> CudaDevice:
    import numpy as np

    from python_backends.runtime.gpu.compile import KernelCache
    from python_backends.runtime.gpu.cuda import CudaDevice, HostBuffer

    class MappedDevice(CudaDevice):
        """Allocates host memory, filled with a pattern that reads as NaN; waits for every launch."""

        def allocate(self, dtype: str, *shape: int) -> Tensor:
            tensor = Tensor(0, dtype, shape)
            buffer = HostBuffer(max(ALIGNMENT, tensor.num_bytes))
            buffer.array[...] = 0xFF
            self.buffers.append(buffer)
            return Tensor(buffer.address, dtype, shape)

        def launch(self, launch: Launch) -> None:
            super().launch(launch)
            self.synchronize()

        def write(self, tensor: Tensor, values: np.ndarray) -> None:
            super().write(tensor, values)
            self.synchronize()

    MappedDevice.buffers = []
    return MappedDevice(KernelCache(_KERNELS))
