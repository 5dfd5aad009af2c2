"""`wicore bench cache`: replacement policies of the KV cache on request traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.commands.bench.options import Plot, Seed
from client.commands.options import AsJson
from client.commands.terminal import Status, command, emit

DEFAULT_CAPACITIES = [1000, 5000, 10_000, 30_000]
Workload = Annotated[str, typer.Option(help="conversation (the recorded trace), or a generator: multi-turn, "
                                            "shared-prompts, agents, scan, zipf, loop.")]  # fmt: skip
TraceFile = Annotated[Path | None, typer.Option(help="Another trace of the same format.")]
Capacities = Annotated[list[int] | None, typer.Option("--capacity", min=1, help="Blocks of 512 tokens in all; may "
                                                      "be given again. [1000 5000 10000 30000]")]  # fmt: skip
Tiers = Annotated[list[int] | None, typer.Option("--tiers", min=1, max=3, help="Tiers; may be given again. [1 2 3]")]
Policies = Annotated[list[str] | None, typer.Option("--policy", help="May be given again. [all]")]


@command
def cache(
    *,
    workload: Workload = "conversation",
    trace: TraceFile = None,
    capacity: Capacities = None,
    tiers: Tiers = None,
    policy: Policies = None,
    seed: Seed = 0,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Replay requests through the KV cache's manager, with compute and copies simulated, and compare policies.

    Hit rate is prompt tokens found ÷ all prompt tokens; "of the gap" is the share of the way from LRU to Belady, who
    knows the future. TTFT is what loading and prefill of a request take alone.

    wicore bench cache --workload scan --capacity 2000 --policy a2cr --policy lru
    """
    from client.bench.cache.report import chart, table
    from client.bench.cache.simulate import POLICIES, replay
    from client.bench.cache.workloads import read_workload
    from python_backends.errors import InvalidParameterError

    chosen = policy or list(POLICIES)
    for name in chosen:
        if name not in POLICIES:
            raise InvalidParameterError(f"there is no policy {name!r}; choose among {', '.join(POLICIES)}")
    requests, source = read_workload(workload, trace, seed)
    status = Status()
    outcomes = []
    for count in tiers or [1, 2, 3]:
        for size in capacity or DEFAULT_CAPACITIES:
            for name in chosen:
                status(f"{name}, {count} tiers, {size} blocks …")
                outcomes.append(replay(requests, name, size, count))
    status.clear()
    if plot is not None:
        chart(outcomes, f"{source}: token hit rate").save(plot)
    if as_json:
        emit({"workload": source, "seed": seed, "replays": [outcome.as_dict() for outcome in outcomes]})
        return
    blocks = sum(len(request.keys) for request in requests)
    print(f"{source}: {len(requests)} requests, {blocks} blocks of 512 tokens\n\n{table(outcomes)}")
