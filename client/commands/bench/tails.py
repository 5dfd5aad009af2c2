"""`wicore bench tails`: where window tails are worth their bytes."""

from __future__ import annotations

from client.commands.bench.cache import TraceFile, Workload
from client.commands.bench.options import Seed
from client.commands.options import AsJson
from client.commands.terminal import Status, command, emit


@command
def tails(
    *, workload: Workload = "conversation", trace: TraceFile = None, seed: Seed = 0, as_json: AsJson = False
) -> None:
    """Replay requests and show, for each choice of where tails are kept, bytes stored and hits that could be served.

    A tail is the sliding window of the local layers at one position; a prompt can be resumed there and nowhere else.
    Everything is kept, so nothing but the choice decides.

    wicore bench tails --workload agents
    """
    from client.bench.cache.tails import CHOICES, replay, tails_text
    from client.bench.cache.workloads import read_workload

    requests, source = read_workload(workload, trace, seed)
    status = Status()
    outcomes = []
    for name in CHOICES:
        status(f"{name} …")
        outcomes.append(replay(requests, name))
    status.clear()
    if as_json:
        emit({"workload": source, "seed": seed, "choices": [outcome.as_dict() for outcome in outcomes]})
        return
    print(f"{source}: {len(requests)} requests, {outcomes[0].tokens:,} tokens held\n\n{tails_text(outcomes)}")
