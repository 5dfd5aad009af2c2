"""Our own kernels for quantized linear layers on x86 CPUs, as a custom-op library for ONNX Runtime.

`accelerate` is all a session needs. The repository on disk stays as it is: nodes are exchanged while the model is
loaded, and where the CPU, the compiler or a self-check says no, the stock kernels run.
"""

from python_backends.runtime.kernels.loading import accelerate

__all__ = ["accelerate"]
