"""How a worker process is told what to run: one JSON object per line, answered by one line.

Only timing and logits cross; the worker keeps its engine loaded, so that engines can be measured in turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from python_backends.errors import ServerUnavailableError

Prompt = Sequence[int]
START_S = 600.0


class Peer(Protocol):
    """An engine in a worker process."""

    def prefill(self, prompt: Prompt) -> float:
        """Seconds to the first token of a prompt."""
        ...

    def decode(self, prompts: Sequence[Prompt], tokens: int) -> list[float]:
        """Seconds of each decode step of prompts of equal length, while all of them decode; greedy."""
        ...

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """[T, V] at every position. Called once, last: the engine need not be able to do more afterwards."""
        ...


def serve(peer: Peer) -> None:
    """Answer calls until standard input ends. What libraries print goes to standard error."""
    from client.bench.machine import peak_memory

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        call: dict[str, Any] = json.loads(line)
        name = call.pop("call")
        try:
            if name == "memory":
                value: Any = peak_memory()
            elif name == "logits":
                np.save(call["path"], peer.logits(call["prompt"]))
                value = call["path"]
            else:
                value = getattr(peer, name)(**call)
            answer = {"value": value}
        except Exception as error:  # whatever it is, the other side is told
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def environment(folders: Sequence[Path], threads: int) -> dict[str, str]:
    """Of a process that finds packages in ``folders`` first and computes with so many threads."""
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


class Worker:
    """A peer's process, as the measuring side sees it; also a context manager.

    Args:
        name: for people.
        module: run with ``python -m``; reads ``arguments`` from its command line.
        folders: searched for packages before the installed ones.
        threads: compute threads, for libraries that read their number from the environment.
        log: file for what it prints.

    Raises:
        ServerUnavailableError: it does not start; the message has its last line.
    """

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], *, folders: Sequence[Path], threads: int, log: Path
    ) -> None:
        self.name = name
        self._log = log
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment(folders, threads),
            )
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, name: str, **arguments: Any) -> Any:
        """Run a method of the peer.

        Raises:
            ServerUnavailableError: it failed, or the process has died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reading tells what it said at its end
        return self._read().get("value")

    def logits(self, prompt: Prompt, folder: Path) -> NDArray[np.float32]:
        """See `Peer.logits`."""
        path = folder / f"{self.name.replace('/', '-').replace(' ', '-')}.npy"
        self.call("logits", prompt=list(prompt), path=str(path))
        values: NDArray[np.float32] = np.load(path)
        path.unlink()
        return values

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        timer = threading.Timer(10.0, self._process.kill)
        timer.start()
        self._process.wait()
        timer.cancel()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> Mapping[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
            raise ServerUnavailableError(f"{self.name} ended: {said[-1]} (log: {self._log})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ServerUnavailableError(f"{self.name} failed: {answer['error']} (log: {self._log})")
        return answer
