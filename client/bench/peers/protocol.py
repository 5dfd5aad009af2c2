"""How a worker process is told what to run: one JSON object per line, answered by one line.

Only timing and logits cross; the worker keeps its engine loaded, so that engines can be measured in turns.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Prompt = Sequence[int]


class Peer(Protocol):
    """An engine in a worker process."""

    def variants(self) -> list[str]:
        """Names of the settings worth trying; the first is in use. Where one is faster is found by trying."""
        ...

    def use(self, variant: str) -> None:
        """Switch to one of them; not timed."""
        ...

    def keep(self, variants: Sequence[str]) -> None:
        """The others are not needed again: free what only they need."""
        ...

    def prefill(self, prompt: Prompt) -> float:
        """Seconds to the first token of a prompt."""
        ...

    def decode(self, prompts: Sequence[Prompt], tokens: int) -> list[float]:
        """Seconds of each decode step of prompts of equal length, while all of them decode; greedy."""
        ...

    def logits(self, prompt: Prompt, last: int) -> NDArray[np.float32]:
        """[last, V] at the last positions. Called once, at the end: the engine need not be able to do more then."""
        ...


class OneVariant:
    """For engines that have nothing to choose."""

    def variants(self) -> list[str]:
        """See `Peer.variants`."""
        return ["default"]

    def use(self, variant: str) -> None:
        """See `Peer.use`."""

    def keep(self, variants: Sequence[str]) -> None:
        """See `Peer.keep`."""


def serve(peer: Peer) -> None:
    """Answer calls until standard input ends. What libraries print goes to standard error."""
    from client.bench.machine import peak_memory, reset_peak_memory

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        call: dict[str, Any] = json.loads(line)
        name = call.pop("call")
        try:
            if name == "memory":
                value: Any = peak_memory()
            elif name == "keep":
                peer.keep(**call)
                reset_peak_memory()
                value = None
            elif name == "logits":
                np.save(Path(call.pop("path")), peer.logits(**call))
                value = None
            else:
                value = getattr(peer, name)(**call)
            answer = {"value": value}
        except Exception as error:  # whatever it is, the other side is told
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
