"""What load is offered to: an engine in this process, or a server over gRPC."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from client.bench.load import WAIT_S, Job, Trace
from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.decoder.parameters import parameters_within
from python_backends.decoder.sequence import Piece, Request
from python_backends.errors import WiCoreError

T = TypeVar("T")


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


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wicore-bench-client", daemon=True)
        self._thread.start()

    def begin(self, work: Coroutine[Any, Any, Any]) -> None:
        """Begin to do it there."""
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it there and wait."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """Stop the loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class ServerTarget:
    """The ensemble through gRPC streams, as the asyncio client gives it."""

    name = "triton"

    def __init__(self, address: str) -> None:
        from client.gateway.triton import Triton

        async def connect() -> Triton:
            return Triton(address, WAIT_S)

        self._thread = LoopThread()
        self._server = self._thread.do(connect())

    def submit(self, job: Job, trace: Trace, done: Callable[[], None]) -> None:
        """See `Target.submit`."""
        self._thread.begin(self._ask(job, trace, done))

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
        totals: dict[str, float] = self._thread.do(self._server.stats())["totals"]
        return totals

    def close(self) -> None:
        """Close the connection and stop the loop."""
        self._thread.do(self._server.close())
        self._thread.close()


class GatewayTarget:
    """The gateway's chat completions as server-sent events, each counted as one token: for servers without drafts.

    Events are told apart and not parsed, as the other side's protobuf is no more than read.
    """

    name = "gateway"

    def __init__(self, address: str, min_tokens: int = 0) -> None:
        """``address`` is the gateway's URL; no answer ends, nor tries to, before ``min_tokens``."""

        async def connect() -> aiohttp.ClientSession:
            return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WAIT_S))

        self._url = f"{address}/v1/chat/completions"
        self._stats = f"{address}/v1/stats"
        self._min_tokens = min_tokens
        self._thread = LoopThread()
        self._session = self._thread.do(connect())

    def submit(self, job: Job, trace: Trace, done: Callable[[], None]) -> None:
        """See `Target.submit`."""
        self._thread.begin(self._ask(job, trace, done))

    async def _ask(self, job: Job, trace: Trace, done: Callable[[], None]) -> None:
        body = {
            "messages": [{"role": "user", "content": job.text}],
            "max_tokens": job.max_tokens,
            "min_tokens": self._min_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        error, rest = "", b""
        try:
            async with self._session.post(self._url, json=body) as answer:
                if answer.status != 200:
                    error = await answer.text()
                async for part in answer.content.iter_any():
                    *events, rest = (rest + part).split(b"\n\n")
                    trace.add(sum(event.startswith(b'data: {"id"') for event in events))
                    error = next((event.decode() for event in events if event.startswith(b'data: {"error"')), error)
        except aiohttp.ClientError as failure:
            error = str(failure)
        trace.end(error)
        done()

    def stats(self) -> Mapping[str, float]:
        """See `Target.stats`."""

        async def ask() -> dict[str, float]:
            async with self._session.get(self._stats) as answer:
                totals: dict[str, float] = (await answer.json())["totals"]
                return totals

        return self._thread.do(ask())

    def close(self) -> None:
        """Close the connections and stop the loop."""
        self._thread.do(self._session.close())
        self._thread.close()
