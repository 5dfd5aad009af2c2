"""`wicore bench tiers`: the KV cache's tiers beside the plain disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.commands.options import AsJson
from client.commands.terminal import Status, command, emit


@command
def tiers(
    *,
    folder: Annotated[Path, typer.Option(help="Where to write; on the disk that is to be measured.")] = Path(),
    mib: Annotated[
        int, typer.Option(min=64, help="MiB written and read in a round; twice as much must be free.")
    ] = 1024,
    block_kib: Annotated[int, typer.Option(min=4, help="KiB of a block.")] = 512,
    tail_kib: Annotated[int, typer.Option(min=4, help="KiB of a tail.")] = 22 * 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median is shown.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure the NVMe tier's bandwidth with the sizes of KV entries, in turns with plain reads and writes.

    wicore bench tiers --folder /mnt/nvme
    """
    from client.bench.tiers import Plan, measure, tiers_text

    status = Status()
    status("writing and reading …")
    found = measure(folder, Plan(mib * 2**20, block_kib * 2**10, tail_kib * 2**10, rounds))
    status.clear()
    if as_json:
        emit(found)
        return
    print(tiers_text(found))
