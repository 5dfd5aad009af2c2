"""How busy the GPU is while something runs, as NVML says: the share of time in which any kernel ran."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from client.gateway.gpu import READ_AGE_S, GpuMeter

PERIOD_S = 1.2 * READ_AGE_S


class Utilisation:
    """A context manager; `mean` afterwards. Needs nvidia-ml-py, as `GpuMeter`."""

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
        meter = GpuMeter()
        while not self._over.wait(PERIOD_S):
            if (reading := meter.read()) is not None:
                self._samples.append(100 * reading.utilization)
