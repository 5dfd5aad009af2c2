"""How busy the GPUs are, from NVML where it is there: `pip install nvidia-ml-py`, and a driver. Never a guess."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("wicore.gateway")

READ_AGE_S = 0.2
"""NVML's own figures are averages over a sixth of a second to a second."""


@dataclass(frozen=True)
class GpuReading:
    """Over all devices of the machine."""

    utilization: float
    """Share of the time in which a kernel ran, 0 to 1; mean of the devices."""
    memory_used_bytes: int
    memory_total_bytes: int


class GpuMeter:
    """Reads NVML; blocks for a millisecond or so."""

    def __init__(self) -> None:
        self._nvml = _open_nvml()
        self._last: GpuReading | None = None
        self._read_s = float("-inf")

    def read(self) -> GpuReading | None:
        """The devices' state now; None without a GPU, or where NVML cannot tell."""
        if self._nvml is not None and time.monotonic() - self._read_s > READ_AGE_S:
            try:
                self._last = _read(self._nvml)
            except self._nvml.NVMLError as error:
                log.warning("NVML: %s", error)
                self._last = None
            self._read_s = time.monotonic()
        return self._last


def _open_nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _read(nvml: Any) -> GpuReading | None:
    handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    if not handles:
        return None
    busy = [nvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in handles]
    memory = [nvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
    return GpuReading(
        utilization=sum(busy) / len(busy) / 100,
        memory_used_bytes=sum(each.used for each in memory),
        memory_total_bytes=sum(each.total for each in memory),
    )
