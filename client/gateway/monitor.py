"""What the server does now: the decoder's counts, sampled every second, and the gateway's own latencies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from client.gateway.gpu import GpuMeter
from client.gateway.triton import Triton
from python_backends.errors import WiCoreError

log = logging.getLogger("wicore.gateway")

SAMPLE_S = 1.0
WINDOW_S = 10.0
"""What rates are taken over."""
FRESH_S = 0.1
"""A state that old is as good as a new one."""
KEPT_LATENCIES = 4096
TIERS = ("device", "host", "nvme")
Sample = tuple[float, dict[str, Any]]


class Latencies:
    """The last so many of one kind, in seconds."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=KEPT_LATENCIES)

    def add(self, seconds: float) -> None:
        """Note one."""
        self._values.append(seconds)

    def summary(self) -> dict[str, float | int | None]:
        """Percentiles in milliseconds (nearest rank), null where there is none yet; and of how many."""
        ordered = sorted(self._values)
        found: dict[str, float | int | None] = {"count": len(ordered)}
        for share in (50, 90, 99):
            rank = max(1, math.ceil(share / 100 * len(ordered)))
            found[f"p{share}"] = round(ordered[rank - 1] * 1000, 3) if ordered else None
        return found


class Monitor:
    """Asks the decoder once a second, and whenever somebody wants to know, but never twice within `FRESH_S`."""

    def __init__(self, triton: Triton, gpu: GpuMeter) -> None:
        self._triton = triton
        self._gpu = gpu
        self._samples: deque[Sample] = deque()
        self._asking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._begun_s = time.monotonic()
        self.first_token, self.inter_token, self.request = Latencies(), Latencies(), Latencies()

    def start(self) -> None:
        """Begin to sample."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop sampling."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def refresh(self) -> dict[str, Any]:
        """The decoder's state, at most `FRESH_S` old.

        Raises:
            ServerUnavailableError, DeadlineExceededError: the decoder does not answer.
        """
        async with self._asking:
            if not self._samples or time.monotonic() - self._samples[-1][0] > FRESH_S:
                found = await self._triton.stats()
                now = time.monotonic()
                self._samples.append((now, found))
                while self._samples[0][0] < now - WINDOW_S and len(self._samples) > 2:
                    self._samples.popleft()
            return self._samples[-1][1]

    async def stats(self) -> dict[str, Any]:
        """What GET /v1/stats tells.

        Raises:
            ServerUnavailableError, DeadlineExceededError: the decoder does not answer.
        """
        state = await self.refresh()
        gpu = await asyncio.to_thread(self._gpu.read)
        first, last = self._samples[0], self._samples[-1]
        rates = _Rates(first, last)
        return {
            "uptime_s": round(time.monotonic() - self._begun_s, 1),
            "queue": {"waiting": state["waiting"], "time": state["queue_times"]},
            "batch": {
                "slots": state["slots"],
                "running": state["running"],
                "decoding": state["decoding"],
                "occupancy": state["running"] / state["slots"],
                "mean_rows": rates.ratio("decode_rows", "decode_steps"),
                "padding_share": state["totals"]["padding_share"],
            },
            "throughput": {
                "window_s": rates.seconds,
                "prompt_tokens_per_s": rates.per_second("prefill_tokens"),
                "generation_tokens_per_s": rates.per_second("drawn_tokens"),
            },
            "latency_ms": {
                "time_to_first_token": self.first_token.summary(),
                "inter_token": self.inter_token.summary(),
                "request": self.request.summary(),
            },
            "tiers": _tiers(state.get("kv_cache")),
            "hit_rates": _hit_rates(state.get("kv_cache")),
            "gpu_utilization": gpu and gpu.utilization,
            "gpu_memory_used_bytes": gpu and gpu.memory_used_bytes,
            "gpu_memory_total_bytes": gpu and gpu.memory_total_bytes,
            "totals": state["totals"],
        }

    @property
    def gpu_utilization(self) -> float | None:
        """0 to 1; None without a GPU."""
        found = self._gpu.read()
        return found.utilization if found else None

    @property
    def last(self) -> dict[str, Any] | None:
        """What the decoder said last; None before it has said anything or while it says nothing."""
        return self._samples[-1][1] if self._samples else None

    async def _run(self) -> None:
        silent = False
        while True:
            try:
                await self.refresh()
                silent = False
            except WiCoreError as error:
                if not silent:
                    log.warning("the decoder tells nothing: %s", error.message)
                silent = True
                self._samples.clear()
            await asyncio.sleep(SAMPLE_S)


class _Rates:
    """Between two samples of one decoder."""

    def __init__(self, first: Sample, last: Sample) -> None:
        self.seconds = round(last[0] - first[0], 3)
        self._before: Mapping[str, float] = first[1]["totals"]
        self._after: Mapping[str, float] = last[1]["totals"]

    def per_second(self, name: str) -> float:
        return round(self._grown(name) / self.seconds, 3) if self.seconds else 0.0

    def ratio(self, above: str, below: str) -> float:
        return round(self._grown(above) / self._grown(below), 3) if self._grown(below) else 0.0

    def _grown(self, name: str) -> float:
        return max(0.0, self._after[name] - self._before[name])  # a decoder that was started again counts from zero


def _tiers(cache: Mapping[str, Any] | None) -> dict[str, Any]:
    """For each tier its bytes and entries; null where the server has no such tier."""
    held: Mapping[str, Any] = cache["tiers"] if cache else {}
    names = {"used_bytes": "used_bytes", "limit_bytes": "limit_bytes", "entries": "entries", "pressure": "pressure"}
    return {
        tier: {name: held[tier][source] for name, source in names.items()} if tier in held else None for tier in TIERS
    }


def _hit_rates(cache: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Share of prompt tokens that each tier gave; null where nothing is cached."""
    if not cache:
        return None
    tokens: Mapping[str, int] = cache["prompt_tokens"]
    whole = sum(tokens.values())
    shares = {tier: tokens.get(tier, 0) / whole if whole else 0.0 for tier in TIERS}
    return {**shares, "total": sum(shares.values())}


def queue_buckets(state: Mapping[str, Any]) -> tuple[Sequence[tuple[str, float]], float]:
    """The decoder's queue-time histogram as Prometheus has it: (upper bound, cumulative count), sum in seconds."""
    times = state["queue_times"]
    bounds = [*(str(bound) for bound in times["bounds_s"]), "+Inf"]
    return list(zip(bounds, map(float, times["counts"]), strict=True)), float(times["sum_s"])
