"""Our engine as a peer: the whole engine for times, its runtime alone for logits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.bench.figures import gaps
from client.bench.load import Job, together
from client.bench.peers.protocol import Prompt, serve
from client.bench.targets import EngineTarget
from python_backends import contract, manifest
from python_backends.config import Config
from python_backends.decoder.open import open_engine
from python_backends.runtime.base import StepInputs
from python_backends.runtime.onnxruntime import OnnxRuntimeDecoder


class WiCore:
    """A repository's decoder with ``slots`` slots of ``context`` tokens, drafts off."""

    def __init__(self, repository: Path, threads: int, slots: int, context: int) -> None:
        self._manifest = manifest.read(repository)
        self._config = Config(
            max_batch_size=slots, max_context_length=context, max_draft=0, num_threads=threads, prefill_chunk=512
        )
        self._target = EngineTarget(open_engine(self._manifest, self._config), self._config)

    def prefill(self, prompt: Prompt) -> float:
        """See `Peer.prefill`."""
        (trace,) = together(self._target, [Job(tuple(prompt), "", 1)])
        return trace.stamps[0] - trace.arrival_s

    def decode(self, prompts: Sequence[Prompt], tokens: int) -> list[float]:
        """See `Peer.decode`. The steps are those of the prompt that began last."""
        traces = together(self._target, [Job(tuple(prompt), "", tokens) for prompt in prompts])
        last = max(traces, key=lambda trace: trace.stamps[0])
        end = min(trace.stamps[-1] for trace in traces)
        return [gap for at, gap in gaps(last) if at <= end]

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """See `Peer.logits`."""
        self._target.engine.close()
        config, length = self._config, len(prompt)
        runtime = OnnxRuntimeDecoder(
            self._manifest.folder(contract.DECODER),
            self._manifest.model,
            num_slots=1,
            max_context_length=config.max_context_length,
            memory_limit=2**34,
            num_threads=config.num_threads,
        )
        real, integer = np.zeros(1, np.float32), np.zeros(1, np.int32)
        inputs = StepInputs(
            first_slot=0,
            input_ids=np.array([prompt], np.int32),
            past_len=integer,
            query_len=np.array([length], np.int32),
            logit_positions=np.arange(length, dtype=np.int32)[None],
            temperature=real,
            top_k=integer,
            top_p=np.ones(1, np.float32),
            min_p=real,
            uniform=np.full((1, length), 0.5, np.float32),
        )
        found = runtime.step(inputs, want_logits=True).logits
        runtime.close()
        assert found is not None
        values: NDArray[np.float32] = found[0]
        return values


if __name__ == "__main__":
    folder, *numbers = sys.argv[1:]
    serve(WiCore(Path(folder), *map(int, numbers)))
