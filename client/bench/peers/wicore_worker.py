"""Our engine as a peer: the whole engine for times, its runtime alone for logits."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.bench.figures import gaps
from client.bench.load import Job, together
from client.bench.peers.protocol import OneVariant, Prompt, serve
from client.bench.targets import EngineTarget
from python_backends import manifest
from python_backends.config import from_values
from python_backends.decoder.open import open_engine, open_runtime
from python_backends.runtime.base import StepInputs, idle_inputs


class WiCore(OneVariant):
    """A repository's decoder with the settings given."""

    def __init__(self, repository: Path, settings: dict[str, Any]) -> None:
        self._manifest = manifest.read(repository)
        self._config = from_values(settings, "the benchmark's settings")
        self._target = EngineTarget(open_engine(self._manifest, self._config), self._config)

    def prefill(self, prompt: Prompt) -> float:
        """See `Peer.prefill`."""
        (trace,) = together(self._target, [Job(tuple(prompt), "", 1)])
        return trace.stamps[0] - trace.arrival_s

    def decode(self, prompts: Sequence[Prompt], tokens: int) -> list[float]:
        """See `Peer.decode`. The steps are those of the prompt that began last.

        Prompts are computed while others decode already, one chunk between two steps: answers are that much longer.
        """
        chunks = sum(-(-len(prompt) // self._config.prefill_chunk) for prompt in prompts)
        jobs = [Job(tuple(prompt), "", tokens + 2 * chunks) for prompt in prompts]
        traces = together(self._target, jobs)
        last = max(traces, key=lambda trace: trace.stamps[0])
        end = min(trace.stamps[-1] for trace in traces)
        seconds = [gap for at, gap in gaps(last) if at <= end][: tokens - 1]
        if not seconds:
            raise RuntimeError("the answers of a batch did not overlap")
        return seconds

    def logits(self, prompt: Prompt, last: int) -> NDArray[np.float32]:
        """See `Peer.logits`."""
        self._target.engine.close()
        runtime = open_runtime(self._manifest, self._config)
        chunk, rows, first = self._config.prefill_chunk, [], len(prompt) - last
        try:
            for start in range(0, len(prompt), chunk):
                part = list(prompt[start : start + chunk])
                wanted = [i for i in range(len(part)) if start + i >= first]
                found = runtime.step(_chunk(part, start, wanted or [0]), want_logits=bool(wanted)).logits
                if wanted:
                    assert found is not None
                    rows.append(found[0])
        finally:
            runtime.close()
        return np.concatenate(rows)


def _chunk(ids: list[int], past: int, positions: list[int]) -> StepInputs:
    """One chunk of a prompt in slot 0, with logits wanted at ``positions``."""
    inputs = idle_inputs(0, 1, len(ids), len(positions))
    inputs.input_ids[0] = ids
    inputs.past_len[0], inputs.query_len[0] = past, len(ids)
    inputs.logit_positions[0] = positions
    return inputs


if __name__ == "__main__":
    serve(WiCore(Path(sys.argv[1]), json.loads(sys.argv[2])))
