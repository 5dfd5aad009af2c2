"""How busy the GPU is while something runs, as NVML says: the share of time in which any kernel ran."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

PERIOD_S = 0.1


class Utilisation:
    """A context manager; `mean` afterwards. Takes pynvml where it is installed, else nvidia-smi."""

    def __init__(self) -> None:
        self._samples: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="utilisation", daemon=True)

    @property
    def mean(self) -> float:
        """Percent; NaN where nothing could be asked."""
        return sum(self._samples) / len(self._samples) if self._samples else float("nan")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        try:
            ask = _reader()
            while not self._over.wait(PERIOD_S):
                self._samples.append(ask())
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"the GPU's utilisation cannot be read: {error}", flush=True)


def _reader() -> Callable[[], float]:
    try:
        import pynvml
    except ImportError:
        return _ask_nvidia_smi
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetUtilizationRates(handle)
    except pynvml.NVMLError:
        return _ask_nvidia_smi
    return lambda: float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)


def _ask_nvidia_smi() -> float:
    command = ["nvidia-smi", "-i", "0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout)
