"""`client.client.Client` for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from client.answer import Answer, AnswersBuilder, Piece, Progress, from_rpc, read_piece
from client.calls import (
    CHANNEL_OPTIONS,
    SESSION_TIMEOUT_S,
    STOP_TIMEOUT_S,
    STOPPED,
    TIMEOUT_S,
    count_of,
    new_request_id,
    refuse_several,
    truncated,
)
from client.connection import DEFAULT_ADDRESS
from client.request import ImageLike, Messages, Options, generate_request, stop_request
from client.sessions import SessionAction, SessionState, session_request, session_state
from python_backends import contract
from python_backends.errors import ServerUnavailableError, WiCoreError


class AsyncClient:
    """`Client` for asyncio. Make it and use it within one event loop."""

    def __init__(self, address: str = DEFAULT_ADDRESS, timeout_s: float | None = TIMEOUT_S) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._stops: set[asyncio.Task[None]] = set()
        self._open: dict[str, Any] = {}
        """Calls whose answer is not complete, by request id."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """See `Client.close`; only a loop that is closed without it leaves requests to their deadline."""
        for request_id in list(self._open):
            self._leave(request_id)
        if self._stops:
            await asyncio.wait(self._stops)
        await self._channel.close()

    async def ready(self, timeout_s: float = 5.0) -> bool:
        """See `Client.ready`."""
        request = service_pb2.ModelReadyRequest(name=contract.ENSEMBLE)
        try:
            return bool((await self._stub.ModelReady(request, timeout=timeout_s)).ready)
        except grpc.RpcError:
            return False

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        images: Sequence[ImageLike] = (),
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """See `Client.generate`."""
        refuse_several(options)
        (answer,) = await self.generate_n(
            prompt, messages=messages, images=images, timeout_s=timeout_s, request_id=request_id, **options
        )
        return answer

    async def generate_n(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        images: Sequence[ImageLike] = (),
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[Options],
    ) -> tuple[Answer, ...]:
        """See `Client.generate_n`."""
        request_id = request_id or new_request_id()
        builder = AnswersBuilder(request_id)
        begin = time.perf_counter()
        pieces = self.stream(
            prompt, messages=messages, images=images, timeout_s=timeout_s, request_id=request_id, **options
        )
        async with aclosing(pieces):
            async for piece in pieces:
                builder.add(piece, time.perf_counter() - begin)
        return builder.finish()

    async def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        images: Sequence[ImageLike] = (),
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Piece, None]:
        """See `Client.stream`. Cancelling the task stops the request; so does closing the iterator (`aclosing`)."""
        request_id = request_id or new_request_id()
        if images:  # files are read and pictures are encoded
            request = await asyncio.to_thread(generate_request, prompt, messages, images, request_id, options)
        else:
            request = generate_request(prompt, messages, images, request_id, options)
        call = self._stub.ModelStreamInfer(iter([request]), timeout=timeout_s or self.timeout_s)
        self._open[request_id] = call
        progress, over = Progress(count_of(options)), False
        try:
            async for response in call:
                piece = read_piece(response)
                if piece is None:
                    continue
                progress.add(piece)
                yield piece
                progress.check()
            if not progress.complete:
                raise truncated()
        except grpc.RpcError as error:
            failure = from_rpc(error, self.address)
            over = isinstance(failure, ServerUnavailableError)
            raise failure from error
        except WiCoreError:
            over = True  # the server has ended it
            raise
        finally:
            if over or progress.complete:
                self._open.pop(request_id, None)
            else:
                self._leave(request_id)

    async def stop(self, request_id: str) -> bool:
        """See `Client.stop`."""
        try:
            call = self._stub.ModelStreamInfer(iter([stop_request(request_id)]), timeout=STOP_TIMEOUT_S)
            pieces = [read_piece(response) async for response in call]
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from error
        return any(piece is not None and piece.finish_reason == STOPPED for piece in pieces)

    async def session(self, name: str, action: SessionAction = "show", *, cache_salt: str = "") -> SessionState:
        """See `Client.session`."""
        request = session_request(name, action, cache_salt, new_request_id())
        try:
            call = self._stub.ModelStreamInfer(iter([request]), timeout=SESSION_TIMEOUT_S)
            return session_state([read_piece(response) async for response in call])
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from error

    def _leave(self, request_id: str) -> None:
        """Stop a request, unless somebody did, from a task of its own: the caller's may be cancelled."""
        call = self._open.pop(request_id, None)
        if call is not None:
            task = asyncio.get_running_loop().create_task(self._deliver_stop(request_id, call))
            self._stops.add(task)
            task.add_done_callback(self._stops.discard)

    async def _deliver_stop(self, request_id: str, call: Any) -> None:
        try:
            await self.stop(request_id)
        except (WiCoreError, grpc.aio.UsageError):
            pass  # a server that has gone, or a closed connection, has no request to stop
        finally:
            call.cancel()
