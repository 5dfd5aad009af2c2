"""A peer's process, as the measuring side sees it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from client.bench.peers.protocol import Prompt
from python_backends.errors import ServerUnavailableError

END_S = 10.0
"""How long a process may take to end before it is killed."""


def environment(folders: Sequence[Path], threads: int) -> dict[str, str]:
    """Of a process that finds packages in ``folders`` first and computes with so many threads."""
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


class Worker:
    """A process that serves one `Peer`; also a context manager.

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
        try:
            self._read()
        except BaseException:
            self.close()
            raise

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

    def logits(self, prompt: Prompt, last: int) -> NDArray[np.float32]:
        """See `Peer.logits`."""
        with tempfile.TemporaryDirectory(prefix="wicore-logits-") as folder:
            path = Path(folder) / "logits.npy"
            self.call("logits", prompt=list(prompt), last=last, path=str(path))
            values: NDArray[np.float32] = np.load(path)
        return values

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it is gone already
                self._process.stdin.close()
        timer = threading.Timer(END_S, self._process.kill)
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
            code = self._process.wait()
            raise ServerUnavailableError(f"{self.name} ended with {code}: {said[-1]} (log: {self._log})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ServerUnavailableError(f"{self.name} failed: {answer['error']} (log: {self._log})")
        return answer
