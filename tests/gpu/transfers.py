"""KV between the card and pinned host memory, by the path that the KV cache takes, beside plain copies of the same run.

- alone: what 8,168 tokens leave (every block and the tail), their parts, the same tokens loaded, and both at once;
- beside decode steps of other slots: how much longer a step takes while the link is kept busy, and what still moves.

The length is no multiple of a page, so a tail has strided parts. What is loaded is read back and compared first.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from cuda.bindings import driver as cu

from python_backends.runtime.base import Transfer
from python_backends.runtime.gpu.cuda import HostBuffer
from python_backends.runtime.gpu.driver import check
from python_backends.runtime.gpu.pages import PAGE_TOKENS
from tests.gpu.report import Report
from tests.gpu.steps import Bench

LENGTH = 8192 - 24
ROUNDS = 5
STEPS = 40
CHUNK_BLOCKS = 8
"""Blocks that a chunk of a prompt leaves at once."""
QUEUED_BYTES = 2 << 30
"""What is kept on its way in each direction beside the steps: more than crosses the link within one."""
DISK_BYTES = 1 << 29


class Link:
    """Two slots of a decoder, one that KV leaves and one that it enters, and pinned memory for each."""

    def __init__(self, bench: Bench, leaves: int, enters: int, length: int) -> None:
        self._device = bench.device
        self._decoder, self._leaves, self._enters = bench.decoder, leaves, enters
        layout = bench.decoder.kv_layout
        self.length = length
        self.block_bytes, self.tail_bytes = layout.block_bytes, layout.tail_bytes(length)
        self._block_tokens, self.num_blocks = layout.block_tokens, length // layout.block_tokens
        self.num_bytes = self.num_blocks * self.block_bytes + self.tail_bytes
        self.left, self.entering = HostBuffer(self.num_bytes), HostBuffer(self.num_bytes)
        bench.decoder.kv.reserve([(leaves, length), (enters, length)])

    def blocks_out(self, count: int, slot: int | None = None, into: HostBuffer | None = None) -> list[Transfer]:
        """The first ``count`` blocks, as the engine gives them to the cache: one by one."""
        source = self._leaves if slot is None else slot
        views = self._views(into or self.left)
        return [
            self._decoder.export_block(source, index * self._block_tokens, view)
            for index, view in enumerate(views[:count])
        ]

    def tail_out(self, slot: int | None = None, into: HostBuffer | None = None) -> list[Transfer]:
        """The tail."""
        source = self._leaves if slot is None else slot
        return [self._decoder.export_tail(source, self.length, self._views(into or self.left)[-1])]

    def all_out(self, slot: int | None = None, into: HostBuffer | None = None) -> list[Transfer]:
        """Every block and the tail."""
        return [*self.blocks_out(self.num_blocks, slot, into), *self.tail_out(slot, into)]

    def all_in(self, source: HostBuffer | None = None) -> list[Transfer]:
        """The same tokens, as a hit loads them: in one go."""
        *blocks, tail = self._views(source or self.entering)
        return [self._decoder.import_blocks(self._enters, blocks, tail, self.length)]

    def is_exact(self) -> bool:
        """Whether what left one slot is what its pages hold, and the same when it has entered the other and left that,
        bit for bit; fills both buffers."""
        wait(self.all_out())
        if not self._holds_its_pages():
            return False
        wait(self.all_in(self.left))
        wait(self.all_out(self._enters, self.entering))
        return bool(np.array_equal(self.left.array, self.entering.array))

    def _holds_its_pages(self) -> bool:
        """The first block and the first page of the window, read by themselves."""
        kv, layout = self._decoder.kv, self._decoder.kv_layout
        start = max(0, self.length - layout.window)
        first = start % PAGE_TOKENS
        places = (
            (kv.global_pool, kv.pages.table[self._leaves], 0, slice(None), 0),
            (
                kv.local_pool,
                kv.ring[self._leaves],
                start // PAGE_TOKENS,
                slice(first, min(PAGE_TOKENS, first + self.length - start)),
                self.num_blocks * self.block_bytes + self.length % layout.block_tokens * layout.global_bytes,
            ),
        )
        for pool, table, index, tokens, offset in places:
            page, size = int(table[index % len(table)]), pool.size // pool.shape[0]
            values = self._device.read(pool.view(page * size, *pool.shape[1:]))
            wanted = np.ascontiguousarray(values[:, :, :, tokens]).view(np.uint8).reshape(-1)
            if not np.array_equal(self.left.array[offset : offset + wanted.size], wanted):
                return False
        return True

    def _views(self, buffer: HostBuffer) -> list[memoryview]:
        whole, size = buffer.array.data, self.block_bytes
        return [*(whole[i * size : (i + 1) * size] for i in range(self.num_blocks)), whole[self.num_blocks * size :]]

    def close(self) -> None:
        """Give the pinned memory back."""
        self.left.close()
        self.entering.close()


class Flow:
    """Transfers of one direction, begun anew so that the link never rests."""

    def __init__(self, begin: Callable[[], Sequence[Transfer]], num_bytes: int) -> None:
        self._begin, self._num_bytes = begin, num_bytes
        self._rounds: deque[Sequence[Transfer]] = deque()
        self.moved_bytes = 0

    def top_up(self) -> None:
        """Begin as many rounds as are missing."""
        while self._rounds and all(transfer.done() for transfer in self._rounds[0]):
            self._rounds.popleft()
        while len(self._rounds) < max(2, QUEUED_BYTES // self._num_bytes):
            self._rounds.append(self._begin())
            self.moved_bytes += self._num_bytes

    def drain(self) -> None:
        """Until everything has arrived."""
        for transfers in self._rounds:
            wait(transfers)


def transfers(report: Report, bench: Bench, disk: Path) -> None:
    """All of the module, and the tier on disk beside plain reads and writes of ``disk``."""
    slots, longest = bench.decoder.spec.num_slots, bench.decoder.spec.max_context_length
    link = Link(bench, slots - 2, slots - 1, min(LENGTH, longest - 24))
    try:
        report.row("transfers", exact=link.is_exact(), tokens=link.length, gb=link.num_bytes / 1e9)
        plain = plain_rates(bench, link)
        report.row("transfers", **{f"plain_{name}_gb_s": rate / 1e9 for name, rate in plain.items()})
        report.guard("transfers alone", lambda: _alone(report, link, plain))
        report.guard("set aside", lambda: _set_aside(report, bench, link, slots - 2))
        for batch in (1, 8):
            if batch <= slots - 2:
                for mapped in (False, True):
                    report.guard(
                        "beside steps", lambda b=batch, m=mapped: _beside_steps(report, bench, link, b, plain, mapped=m)
                    )
    finally:
        bench.device.maps_answers = False
        bench.device.synchronize()
        link.close()
    report.guard("disk", lambda: _disk(report, bench, disk))


def plain_rates(bench: Bench, link: Link) -> dict[str, float]:
    """Bytes a second of one large asynchronous copy between the pool and pinned memory: out, in, and both at once."""
    pool = bench.decoder.kv.global_pool
    size = min(link.num_bytes, pool.num_bytes // 2)
    streams = [check(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING)) for _ in range(2)]

    def out() -> None:
        check(cu.cuMemcpyDtoHAsync(link.left.address, pool.address, size, streams[0]))

    def into() -> None:
        check(cu.cuMemcpyHtoDAsync(pool.address + size, link.entering.address, size, streams[1]))

    rates = {}
    for name, copies in (("out", (out,)), ("in", (into,)), ("both", (out, into))):
        seconds = []
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            for copy in copies:
                copy()
            for stream in streams:
                check(cu.cuStreamSynchronize(stream))
            seconds.append(time.perf_counter() - began)
        rates[name] = len(copies) * size / statistics.median(seconds[1:])
    for stream in streams:
        check(cu.cuStreamDestroy(stream))
    return rates


def _alone(report: Report, link: Link, plain: dict[str, float]) -> None:
    blocks = link.num_blocks * link.block_bytes
    for name, run, num_bytes, way in (
        ("blocks out", lambda: link.blocks_out(link.num_blocks), blocks, "out"),
        ("tail out", link.tail_out, link.tail_bytes, "out"),
        ("all out", link.all_out, link.num_bytes, "out"),
        ("all in", link.all_in, link.num_bytes, "in"),
        ("out and in", lambda: [*link.all_in(), *link.all_out()], 2 * link.num_bytes, "both"),
    ):
        issued, seconds = [], []
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            begun = run()
            issued.append(time.perf_counter() - began)
            wait(begun)
            seconds.append(time.perf_counter() - began)
        rate = num_bytes / statistics.median(seconds[1:])
        report.row(
            "transfers",
            what=name,
            gb=num_bytes / 1e9,
            gb_s=rate / 1e9,
            of_plain=rate / plain[way],
            issue_ms=1e3 * statistics.median(issued[1:]),
        )


def _set_aside(report: Report, bench: Bench, link: Link, slot: int) -> None:
    """A slot that makes room for another goes into memory that is not pinned."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        bench.decoder.export_slot(slot, link.length)
        seconds.append(time.perf_counter() - began)
    report.row("transfers", what="set aside", gb_s=link.num_bytes / statistics.median(seconds) / 1e9)


def _beside_steps(
    report: Report, bench: Bench, link: Link, batch: int, plain: dict[str, float], *, mapped: bool
) -> None:
    """``mapped``: the steps' answers cross the link by a kernel, not by the copy engine that KV keeps busy."""
    inputs = bench.inputs(batch, min(8192, bench.decoder.spec.max_context_length) - 1)
    bench.device.maps_answers = False
    wanted = bench.decoder.step(inputs).next_token
    bench.device.maps_answers = mapped
    same = bool((bench.decoder.step(inputs).next_token == wanted).all())
    leaving = CHUNK_BLOCKS * link.block_bytes + link.tail_bytes
    flows = {
        "out": lambda: Flow(lambda: [*link.blocks_out(min(CHUNK_BLOCKS, link.num_blocks)), *link.tail_out()], leaving),
        "in": lambda: Flow(link.all_in, link.num_bytes),
    }
    alone = 0.0
    for name, ways in (("none", ()), ("out", ("out",)), ("in", ("in",)), ("both", ("out", "in")), ("none", ())):
        running = [flows[way]() for way in ways]
        steps, issuing = [], 0.0
        began = time.perf_counter()
        for _ in range(STEPS):
            before = time.perf_counter()
            for flow in running:
                flow.top_up()
            start = time.perf_counter()
            bench.decoder.step(inputs)
            steps.append(time.perf_counter() - start)
            issuing += start - before
        for flow in running:
            flow.drain()
        rate = sum(flow.moved_bytes for flow in running) / (time.perf_counter() - began)
        step = statistics.median(steps)
        alone = alone or step
        report.row(
            "transfers-beside-steps",
            batch=batch,
            mapped=mapped,
            same_tokens=same,
            way=name,
            step_ms=1e3 * step,
            longest_ms=1e3 * max(steps),
            slower=step / alone - 1,
            mean_slower=statistics.fmean(steps) / alone - 1,
            issue_ms=1e3 * issuing / STEPS,
            gb_s=rate / 1e9,
            of_plain=rate / plain[name] if ways else 0.0,
        )


def _disk(report: Report, bench: Bench, folder: Path) -> None:
    """What `wicore bench tiers` measures, with this shape's blocks and tails."""
    from client.bench.tiers import Plan, measure

    layout = bench.decoder.kv_layout
    found = measure(
        folder,
        Plan(max(DISK_BYTES, 8 * layout.largest_tail_bytes), layout.block_bytes, layout.largest_tail_bytes, rounds=2),
    )
    for run in found["runs"]:
        speeds = {f"{name.replace(' ', '_')}_gb_s": speed / 1e9 for name, speed in run["bytes_per_s"].items()}
        report.row(
            "disk",
            entries=run["entries"],
            entry_mb=run["entry_bytes"] / 1e6,
            direct=found["configuration"]["direct_io"],
            **speeds,
            **{f"of_raw_{way.replace(' ', '_')}": share for way, share in run["of_raw"].items()},
        )


def wait(transfers: Sequence[Transfer]) -> None:
    """Until all are over."""
    for transfer in transfers:
        transfer.wait()
