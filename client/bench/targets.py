"""What load is offered to: an engine in this process, or a server over gRPC."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from client.bench.load import WAIT_S, Job, Trace
from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.decoder.parameters import parameters_within
from python_backends.decoder.sequence import Piece, Request
from python_backends.errors import WiCoreError


class EngineTarget:
    """The engine alone: what the decoder stage runs, without Triton and without the tokenizer stage."""

    name = "engine"

    def __init__(self, engine: Engine, config: Config) -> None:
        self.engine = engine
        self._config = config

    def submit(self, job: Job, trace: Trace, done: Callable[[], None]) -> None:
        """See `Target.submit`."""

        def sink(piece: Piece) -> None:
            trace.add(len(piece.token_ids))
            if piece.finish_reason:
                trace.end("" if piece.error is None else piece.error.message)
                done()

        parameters = parameters_within(self._config, max_tokens=job.max_tokens, temperature=0.0, ignore_eos=True)
        self.engine.submit(Request(job.input_ids, parameters, sink))

    def stats(self) -> Mapping[str, float]:
        """See `Target.stats`."""
        return self.engine.stats.read()


@contextmanager
def open_engine_target(repository: Path, config: Config) -> Iterator[EngineTarget]:
    """Load the decoder of a repository; closed on the way out.

    Raises:
        ArtifactError, ConfigError: as `open_engine`.
    """
    from python_backends import contract, manifest
    from python_backends.decoder.open import open_engine

    engine = open_engine(manifest.load(repository, [contract.DECODER, contract.TOKENIZER]), config)
    try:
        yield EngineTarget(engine, config)
    finally:
        engine.close()


class ServerTarget:
    """The ensemble through gRPC streams, as the asyncio client gives it; its loop runs in a thread of its own."""

    name = "triton"

    def __init__(self, address: str) -> None:
        from client.gateway.triton import Triton

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wicore-bench-client", daemon=True)
        self._thread.start()

        async def connect() -> Triton:
            return Triton(address, WAIT_S)

        self._server = asyncio.run_coroutine_threadsafe(connect(), self._loop).result()

    def submit(self, job: Job, trace: Trace, done: Callable[[], None]) -> None:
        """See `Target.submit`."""
        asyncio.run_coroutine_threadsafe(self._ask(job, trace, done), self._loop)

    async def _ask(self, job: Job, trace: Trace, done: Callable[[], None]) -> None:
        error = ""
        try:
            async for piece in self._server.client.stream(
                job.text, max_tokens=job.max_tokens, temperature=0.0, ignore_eos=True
            ):
                trace.add(len(piece.token_ids))
        except WiCoreError as failure:
            error = failure.message
        trace.end(error)
        done()

    def stats(self) -> Mapping[str, float]:
        """See `Target.stats`."""
        found = asyncio.run_coroutine_threadsafe(self._server.stats(), self._loop).result()
        totals: dict[str, float] = found["totals"]
        return totals

    def close(self) -> None:
        """Close the connection and stop the loop."""
        asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
