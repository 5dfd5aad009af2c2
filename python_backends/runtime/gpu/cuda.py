"""A CUDA device through the driver API: memory, compiled kernels, streams and graphs. No PyTorch, no Triton-lang."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cuda.bindings import driver as cu
from numpy.typing import NDArray

from python_backends.errors import ArtifactError, ConfigError, InternalError
from python_backends.runtime.base import Transfer
from python_backends.runtime.gpu.compile import Compiled, KernelCache
from python_backends.runtime.gpu.copies import CopyStreams, CudaTransfer
from python_backends.runtime.gpu.driver import check
from python_backends.runtime.gpu.kernels import words
from python_backends.runtime.gpu.launch import ALIGNMENT, Copy, Launch, Operation, Tensor

_STATIC_SHARED_BYTES = 48 * 1024
"""Shared memory a kernel may use without asking for more."""
_STAGING_BYTES = 8 << 20
"""Pinned memory through which small arrays pass."""
_MAPPED_BYTES = 64 << 10
"""Arrays up to this size may cross the link by a kernel."""


class CudaDevice:
    """A `Device` on one GPU. Methods may be called from any thread, one at a time.

    Args:
        kernels: where compiled kernels lie.
        memory_limit: bytes that may be allocated; more is refused.
        ordinal: which GPU.
        use_graphs: record steps as CUDA graphs; without, every replay launches each kernel anew.
        num_streams: one for the steps and the others for KV that leaves and enters (`CopyStreams`), each of which takes
            8 MB of the memory; with one stream it waits in line with the steps.

    Raises:
        ArtifactError: no driver or no such GPU.
    """

    def __init__(
        self,
        kernels: KernelCache,
        *,
        memory_limit: int | None = None,
        ordinal: int = 0,
        use_graphs: bool = True,
        num_streams: int = 1,
    ) -> None:
        self._kernels = kernels
        self._use_graphs = use_graphs
        self._handle = _open_device(ordinal)
        self._context = check(cu.cuDevicePrimaryCtxRetain(self._handle))
        self.activate()
        self._stream = check(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING))
        free, self.total_bytes = check(cu.cuMemGetInfo())
        self.memory_limit = min(free, memory_limit) if memory_limit else free
        self.allocated_bytes = 0
        self._allocations: list[int] = []
        self._functions: dict[str, Any] = {}
        self._modules: list[Any] = []
        self._graphs: list[CudaRecording] = []
        self._staging = HostBuffer(_STAGING_BYTES)
        self._answers = HostBuffer(_MAPPED_BYTES)
        self.maps_answers = True
        """A step's few kilobytes of answers are written to the host by a kernel, instead of waiting for the copy engine
        that KV on its way out keeps busy: a step is 3 % slower beside it, and not 24 %. Its inputs are copied all the
        same: read by a kernel they cost 7 % beside KV on its way in, and copied 4 %."""
        self._word_copies: dict[tuple[int, int, int], KernelLaunch] = {}
        self._staging_free = check(cu.cuEventCreate(cu.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        attribute = cu.CUdevice_attribute
        major, minor = (
            check(cu.cuDeviceGetAttribute(name, self._handle))
            for name in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self._capability = int(major) * 10 + int(minor)
        self.name = check(cu.cuDeviceGetName(128, self._handle)).split(b"\0")[0].decode()
        self._copies = CopyStreams(
            self._context, self._stream, num_streams - 1, lambda size: self.allocate("u8", size).address
        )

    @property
    def capability(self) -> int:
        """See `Device.capability`."""
        return self._capability

    @property
    def stream(self) -> int:
        """The stream of all steps, as the driver's handle."""
        return int(self._stream)

    def activate(self) -> None:
        """Make the GPU's context current in the calling thread."""
        check(cu.cuCtxSetCurrent(self._context))

    # --- memory -----------------------------------------------------------------------------------------------

    def allocate(self, dtype: str, *shape: int) -> Tensor:
        """See `Device.allocate`."""
        tensor = Tensor(0, dtype, shape)
        size = max(ALIGNMENT, tensor.num_bytes)
        if self.allocated_bytes + size > self.memory_limit:
            raise ConfigError(
                f"{self.name}: {size / 1e9:.2f} GB more than the {self.allocated_bytes / 1e9:.2f} GB in use are beyond "
                f"gpu_memory_gb or what is free ({self.memory_limit / 1e9:.2f} GB); raise it, free the GPU's memory, "
                "or take fewer slots, a shorter context or a smaller --precision"
            )
        address = int(check(cu.cuMemAlloc(size)))
        self._allocations.append(address)
        self.allocated_bytes += size
        return Tensor(address, dtype, shape)

    def write(self, tensor: Tensor, values: NDArray[Any]) -> None:
        """See `Device.write`; small arrays pass through pinned memory and do not wait for the GPU."""
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if flat.nbytes != tensor.num_bytes:
            raise InternalError(f"{flat.nbytes} bytes for a tensor of {tensor.num_bytes}")
        for start in range(0, flat.nbytes, _STAGING_BYTES):
            part = flat[start : start + _STAGING_BYTES]
            check(cu.cuEventSynchronize(self._staging_free))
            self._staging.array[: part.nbytes] = part
            check(cu.cuMemcpyHtoDAsync(tensor.address + start, self._staging.address, part.nbytes, self._stream))
            check(cu.cuEventRecord(self._staging_free, self._stream))

    def read(self, tensor: Tensor, into: NDArray[Any] | None = None) -> NDArray[Any]:
        """See `Device.read`."""
        from python_backends.runtime.gpu.launch import DTYPES

        target = np.empty(tensor.shape, DTYPES[tensor.dtype]) if into is None else into
        if self._is_mapped(tensor.address, tensor.num_bytes):
            self._copy_words(tensor.address, self._answers.address, tensor.num_bytes)
            check(cu.cuStreamSynchronize(self._stream))
            target.reshape(-1).view(np.uint8)[...] = self._answers.array[: tensor.num_bytes]
            return target
        check(cu.cuMemcpyDtoHAsync(target.ctypes.data, tensor.address, tensor.num_bytes, self._stream))
        check(cu.cuStreamSynchronize(self._stream))
        return target

    def _is_mapped(self, address: int, num_bytes: int) -> bool:
        return self.maps_answers and 0 < num_bytes <= _MAPPED_BYTES and not (address % 16 or num_bytes % 4)

    def _copy_words(self, source: int, target: int, num_bytes: int) -> None:
        """By a kernel on the steps' stream; the target lies on the host."""
        key = (source, target, num_bytes)
        if key not in self._word_copies:
            ends = (Tensor(address, "i32", (num_bytes // 4,)) for address in (source, target))
            self._word_copies[key] = self._prepare(words.copy(*ends))
        self._word_copies[key].issue(self.stream)

    def fill_zero(self, tensor: Tensor) -> None:
        """See `Device.fill_zero`."""
        check(cu.cuMemsetD8Async(tensor.address, 0, tensor.num_bytes, self._stream))

    def copy_out(self, copies: Sequence[Copy], after: Sequence[Transfer] = ()) -> CudaTransfer:
        """See `Device.copy_out`."""
        return self._copies.copy(copies, after, out=True)

    def copy_in(self, copies: Sequence[Copy], after: Sequence[Transfer] = ()) -> CudaTransfer:
        """See `Device.copy_in`."""
        return self._copies.copy(copies, after, out=False)

    def wait_for(self, transfer: Transfer) -> None:
        """See `Device.wait_for`."""
        self._copies.order(self._stream, transfer)

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        check(cu.cuStreamSynchronize(self._stream))
        self._copies.synchronize()

    # --- kernels ----------------------------------------------------------------------------------------------

    def launch(self, launch: Launch) -> None:
        """Issue one kernel now."""
        self._prepare(launch).issue(self.stream)

    def compile_all(self, launches: Sequence[Launch], progress: Callable[[int, int], None] | None = None) -> None:
        """Compile what is missing, several at once; see `KernelCache.compile_all`."""
        self._kernels.compile_all(launches, self._capability, progress)

    def record(self, steps: Sequence[Launch | Operation]) -> CudaRecording:
        """See `Device.record`."""
        operations = [self._prepare(step) if isinstance(step, Launch) else step for step in steps]
        recording = CudaRecording(operations, self._stream, as_graph=self._use_graphs)
        self._graphs.append(recording)
        return recording

    def _prepare(self, launch: Launch) -> KernelLaunch:
        compiled = self._kernels.get(launch, self._capability)
        if compiled.key not in self._functions:
            self._functions[compiled.key] = self._load(compiled)
        return KernelLaunch(self._functions[compiled.key], compiled, launch)

    def _load(self, compiled: Compiled) -> Any:
        module = check(cu.cuModuleLoadData(compiled.cubin))
        self._modules.append(module)
        function = check(cu.cuModuleGetFunction(module, compiled.name.encode()))
        if compiled.shared_bytes > _STATIC_SHARED_BYTES:
            name = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(cu.cuFuncSetAttribute(function, name, compiled.shared_bytes))
        return function

    def close(self) -> None:
        """See `Device.close`."""
        self.activate()
        self.synchronize()
        self._copies.close()
        for graph in self._graphs:
            graph.close()
        for module in self._modules:
            check(cu.cuModuleUnload(module))
        for address in self._allocations:
            check(cu.cuMemFree(address))
        self._staging.close()
        self._answers.close()
        self._graphs, self._modules, self._allocations, self._functions, self._word_copies = [], [], [], {}, {}
        check(cu.cuStreamDestroy(self._stream))
        check(cu.cuDevicePrimaryCtxRelease(self._handle))


class KernelLaunch:
    """An `Operation`: a loaded kernel with its arguments packed for the driver."""

    def __init__(self, function: Any, compiled: Compiled, launch: Launch) -> None:
        self._function, self._grid = function, launch.grid
        self._threads, self._shared = 32 * compiled.num_warps, compiled.shared_bytes
        values: list[Any] = []
        for arg in launch.args:
            if isinstance(arg, Tensor):
                values.append(ctypes.c_void_p(arg.address))
            elif isinstance(arg, float):
                values.append(ctypes.c_float(arg))
            elif arg is not None:
                values.append(ctypes.c_int32(arg))
        values += [ctypes.c_void_p(0)] * compiled.hidden_pointers
        self._values = values  # the packed array below holds their addresses
        self._packed = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))

    def issue(self, stream: int) -> None:
        """See `Operation.issue`."""
        packed = ctypes.addressof(self._packed)
        check(cu.cuLaunchKernel(self._function, *self._grid, self._threads, 1, 1, self._shared, stream, packed, 0))


class CudaRecording:
    """`Recording` of a `CudaDevice`: a CUDA graph, or the launches themselves."""

    def __init__(self, operations: Sequence[Operation], stream: Any, *, as_graph: bool) -> None:
        self.num_operations = len(operations)
        self._operations, self._stream, self._executable = tuple(operations), stream, None
        if as_graph:
            for operation in operations:  # what a first use allocates or tunes cannot happen while recording
                operation.issue(int(stream))
            check(cu.cuStreamSynchronize(stream))
            check(cu.cuStreamBeginCapture(stream, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
            try:
                for operation in operations:
                    operation.issue(int(stream))
            finally:
                graph = check(cu.cuStreamEndCapture(stream))
            self._executable = check(cu.cuGraphInstantiate(graph, 0))
            check(cu.cuGraphDestroy(graph))

    def replay(self) -> None:
        """See `Recording.replay`."""
        if self._executable is not None:
            check(cu.cuGraphLaunch(self._executable, self._stream))
            return
        for operation in self._operations:
            operation.issue(int(self._stream))

    def close(self) -> None:
        """Free the graph."""
        if self._executable is not None:
            check(cu.cuGraphExecDestroy(self._executable))
            self._executable = None


class HostBuffer:
    """Pinned, mapped host memory."""

    def __init__(self, num_bytes: int) -> None:
        """Needs a current context."""
        flags = cu.CU_MEMHOSTALLOC_PORTABLE | cu.CU_MEMHOSTALLOC_DEVICEMAP
        self.address = int(check(cu.cuMemHostAlloc(num_bytes, flags)))
        raw = (ctypes.c_uint8 * num_bytes).from_address(self.address)
        self.array: NDArray[np.uint8] = np.frombuffer(memoryview(raw), np.uint8)

    def close(self) -> None:
        """Give it back; nothing may use ``array`` afterwards."""
        check(cu.cuMemFreeHost(self.address))


def driver_fault() -> str:
    """Why no GPU can be used here; empty where one can."""
    try:
        (status,) = cu.cuInit(0)
    except Exception:  # the binding raises its loader's own exceptions
        return "no NVIDIA driver was found; install it (nvidia-smi must list the GPU)"
    if status != cu.CUresult.CUDA_SUCCESS:
        return f"the NVIDIA driver cannot be used ({status.name}); does nvidia-smi list the GPU?"
    return "" if check(cu.cuDeviceGetCount()) else "the NVIDIA driver lists no GPU; is CUDA_VISIBLE_DEVICES empty?"


def _open_device(ordinal: int) -> Any:
    if fault := driver_fault():
        raise ArtifactError(f"{fault}, or build for the CPU with `wicore build CHECKPOINT --runtime onnxruntime`")
    count = check(cu.cuDeviceGetCount())
    if ordinal >= count:
        raise ArtifactError(f"GPU {ordinal} of {count}; set CUDA_VISIBLE_DEVICES, or build with --runtime onnxruntime")
    return check(cu.cuDeviceGet(ordinal))
