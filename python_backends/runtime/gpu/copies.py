"""KV between a GPU and host memory, on CUDA streams of its own beside the steps.

Runs that are neighbours are joined and large ones are cut: a step's small copies share the copy engines, and wait for
one part at the most. Strided pieces are packed on the device first, so that whatever crosses the link is one run; their
rows are too short for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda.bindings import driver as cu

from python_backends.runtime.base import Transfer
from python_backends.runtime.gpu.driver import check
from python_backends.runtime.gpu.launch import Copy, Piece

PART_BYTES = 8 << 20
"""Most bytes of one copy: 0.15 ms of a 55 GB/s link, which reaches 97 % of its speed with such parts."""


class CudaTransfer:
    """`Transfer` on a GPU: everything issued on ``stream`` so far."""

    def __init__(self, events: _Events, stream: Any, payloads: Sequence[memoryview]) -> None:
        self._events, self._payloads = events, payloads  # the memory must outlive the copy
        self.event = events.take()
        """The driver's handle."""
        check(cu.cuEventRecord(self.event, stream))

    def done(self) -> bool:
        """See `Transfer.done`."""
        check(cu.cuCtxSetCurrent(self._events.context))
        (status,) = cu.cuEventQuery(self.event)
        if status == cu.CUresult.CUDA_ERROR_NOT_READY:
            return False
        check((status,))
        return True

    def wait(self) -> None:
        """See `Transfer.wait`."""
        check(cu.cuCtxSetCurrent(self._events.context))
        check(cu.cuEventSynchronize(self.event))

    def __del__(self) -> None:
        if hasattr(self, "event"):
            self._events.give_back(self.event)


class _Events:
    """Events are used again: one whose transfer nobody knows any more is free."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self._free: list[Any] = []

    def take(self) -> Any:
        """One that threads sleep on."""
        flags = cu.CUevent_flags.CU_EVENT_DISABLE_TIMING | cu.CUevent_flags.CU_EVENT_BLOCKING_SYNC
        return self._free.pop() if self._free else check(cu.cuEventCreate(flags))

    def give_back(self, event: Any) -> None:
        """From any thread, also when all is closed."""
        self._free.append(event)

    def close(self) -> None:
        """Destroy those that are free; a transfer that somebody still knows keeps its own until the context ends."""
        while self._free:
            check(cu.cuEventDestroy(self._free.pop()))


@dataclass(frozen=True)
class _Lane:
    """A stream, and the address of `PART_BYTES` of device memory; 0: strided pieces cross the link as they are."""

    stream: Any
    staging: int

    def copy(self, part: Piece, host: int, *, out: bool) -> None:
        if part.height == 1:
            self._cross(part.address, host, part.width, out=out)
        elif not self.staging:
            _rows(part, host, cu.CUmemorytype.CU_MEMORYTYPE_HOST, self.stream, out=out)
        elif out:
            _rows(part, self.staging, cu.CUmemorytype.CU_MEMORYTYPE_DEVICE, self.stream, out=True)
            self._cross(self.staging, host, part.num_bytes, out=True)
        else:
            self._cross(self.staging, host, part.num_bytes, out=False)
            _rows(part, self.staging, cu.CUmemorytype.CU_MEMORYTYPE_DEVICE, self.stream, out=False)

    def _cross(self, device: int, host: int, num_bytes: int, *, out: bool) -> None:
        if out:
            check(cu.cuMemcpyDtoHAsync(host, device, num_bytes, self.stream))
        else:
            check(cu.cuMemcpyHtoDAsync(device, host, num_bytes, self.stream))


class CopyStreams:
    """Streams that carry pieces out and in by turns.

    Args:
        context: of the GPU.
        steps: the stream of the steps; copies wait for what was issued there before.
        count: streams beside it: one serves both ways, two one each, more take turns, those out first; with none
            copies wait in line with the steps.
        allocate: device memory of so many bytes; its address.

    Raises:
        ConfigError: as ``allocate``.
    """

    def __init__(self, context: Any, steps: Any, count: int, allocate: Callable[[int], int]) -> None:
        self._steps, self._events = steps, _Events(context)
        self._own = [
            _Lane(check(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING)), allocate(PART_BYTES))
            for _ in range(count)
        ]
        in_line = [_Lane(steps, 0)]
        self._out = itertools.cycle(self._own[::2] or in_line)
        self._in = itertools.cycle(self._own[1::2] or self._own or in_line)
        self._issued = self._events.take()

    def copy(self, copies: Sequence[Copy], after: Sequence[Transfer], *, out: bool) -> CudaTransfer:
        """Start to copy, after what the steps' stream has now and ``after``."""
        lane = next(self._out if out else self._in)
        if lane.staging:
            check(cu.cuEventRecord(self._issued, self._steps))
            check(cu.cuStreamWaitEvent(lane.stream, self._issued, 0))
        for transfer in after:
            self.order(lane.stream, transfer)
        for piece, host in _joined(copies):
            done = 0
            for part in _parts(piece):
                lane.copy(part, host + done, out=out)
                done += part.num_bytes
        return CudaTransfer(self._events, lane.stream, [payload for _, payload in copies])

    def order(self, stream: Any, transfer: Transfer) -> None:
        """What is issued on ``stream`` from now on runs after a transfer."""
        if isinstance(transfer, CudaTransfer):
            check(cu.cuStreamWaitEvent(stream, transfer.event, 0))
        else:
            transfer.wait()

    def synchronize(self) -> None:
        """Wait for every copy."""
        for lane in self._own:
            check(cu.cuStreamSynchronize(lane.stream))

    def close(self) -> None:
        """Wait for the copies and give the streams back."""
        self.synchronize()
        for lane in self._own:
            check(cu.cuStreamDestroy(lane.stream))
        self._events.give_back(self._issued)
        self._events.close()


def _joined(copies: Sequence[Copy]) -> Iterator[tuple[Piece, int]]:
    """Pieces and their addresses on the host; runs that are neighbours on both sides are one."""
    run: tuple[Piece, int] | None = None
    for pieces, payload in copies:
        host = np.frombuffer(payload, np.uint8).ctypes.data if pieces else 0
        for piece in pieces:
            if run is not None and piece.height == run[0].height == 1:
                first, at = run
                if (first.address + first.width, at + first.width) == (piece.address, host):
                    width = first.width + piece.width
                    run, host = (Piece(first.address, width, width, 1), at), host + piece.width
                    continue
            if run is not None:
                yield run
            run, host = (piece, host), host + piece.num_bytes
    if run is not None:
        yield run


def _parts(piece: Piece) -> Iterator[Piece]:
    """A piece in pieces of at most `PART_BYTES`."""
    if piece.num_bytes <= PART_BYTES:
        yield piece
    elif piece.height == 1:
        for at in range(0, piece.width, PART_BYTES):
            width = min(PART_BYTES, piece.width - at)
            yield Piece(piece.address + at, width, width, 1)
    else:
        rows = max(1, PART_BYTES // piece.width)
        for first in range(0, piece.height, rows):
            yield Piece(piece.address + first * piece.pitch, piece.width, piece.pitch, min(rows, piece.height - first))


def _rows(part: Piece, packed: int, memory: Any, stream: Any, *, out: bool) -> None:
    """Copy a strided part to, or from, rows that lie one behind the other at ``packed``."""
    copy = cu.CUDA_MEMCPY2D()
    copy.WidthInBytes, copy.Height = part.width, part.height
    device = cu.CUmemorytype.CU_MEMORYTYPE_DEVICE
    on_host = memory == cu.CUmemorytype.CU_MEMORYTYPE_HOST
    if out:
        copy.srcMemoryType, copy.srcDevice, copy.srcPitch = device, cu.CUdeviceptr(part.address), part.pitch
        copy.dstMemoryType, copy.dstPitch = memory, part.width
        if on_host:
            copy.dstHost = packed
        else:
            copy.dstDevice = cu.CUdeviceptr(packed)
    else:
        copy.dstMemoryType, copy.dstDevice, copy.dstPitch = device, cu.CUdeviceptr(part.address), part.pitch
        copy.srcMemoryType, copy.srcPitch = memory, part.width
        if on_host:
            copy.srcHost = packed
        else:
            copy.srcDevice = cu.CUdeviceptr(packed)
    check(cu.cuMemcpy2DAsync(copy, stream))
