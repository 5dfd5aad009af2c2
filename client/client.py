"""Asking a WiCore server over gRPC: `Client` blocks, `async_client.AsyncClient` is for asyncio, otherwise the same.

One connection carries any number of requests at once, each a stream of its own. A caller that goes away before its
answer is complete (a closed generator, a cancelled task, Ctrl-C) stops the request: Triton does not tell the stages of
an ensemble that a stream was cancelled, so the client tells the decoder.
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Generator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.experimental
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

# A call that is read in the thread that makes it: at its exit the interpreter starts no threads (3.12).
_SYNC_OPTIONS = (*CHANNEL_OPTIONS, (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1))


class Client:
    """A connection to a server, for use from any number of threads; also a context manager.

    ``address`` is the gRPC ``host:port``. ``timeout_s`` bounds every request as a whole unless it names its own.
    Every method raises exceptions of `python_backends.errors` only: `ServerUnavailableError` where nobody answers,
    subclasses of `InvalidRequestError` for what the server refuses, `DeadlineExceededError`, `OverloadedError` …
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, timeout_s: float | None = TIMEOUT_S) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=_SYNC_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._stop_call = self._channel.unary_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        self._open: dict[str, Any] = {}
        """Calls whose answer is not complete, by request id."""
        _CLIENTS.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop what is not complete, then close the connection. Done at the interpreter's exit too."""
        for request_id in list(self._open):
            self._leave(request_id)
        self._channel.close()

    def ready(self, timeout_s: float = 5.0) -> bool:
        """Whether a server answers and its models are loaded."""
        request = service_pb2.ModelReadyRequest(name=contract.ENSEMBLE)
        try:
            return bool(self._stub.ModelReady(request, timeout=timeout_s).ready)
        except grpc.RpcError:
            return False

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        images: Sequence[ImageLike] = (),
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """The whole answer to a prompt or to a conversation, with pictures in the order of their placeholders.

        Raises:
            WiCoreError: as the class says; also where the answer ended early.
        """
        refuse_several(options)
        (answer,) = self.generate_n(
            prompt, messages=messages, images=images, timeout_s=timeout_s, request_id=request_id, **options
        )
        return answer

    def generate_n(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        images: Sequence[ImageLike] = (),
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[Options],
    ) -> tuple[Answer, ...]:
        """The ``n`` answers to one prompt, by index, each with its own finish reason, usage and times.

        Raises:
            WiCoreError: as the class says; also where any of the answers ended early.
        """
        request_id = request_id or new_request_id()
        builder = AnswersBuilder(request_id)
        begin = time.perf_counter()
        pieces = self.stream(
            prompt, messages=messages, images=images, timeout_s=timeout_s, request_id=request_id, **options
        )
        with closing(pieces):
            for piece in pieces:
                builder.add(piece, time.perf_counter() - begin)
        return builder.finish()

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        images: Sequence[ImageLike] = (),
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[Options],
    ) -> Generator[Piece, None, None]:
        """The answer piece by piece as it is decoded. Closing the iterator stops the request.

        With ``n`` above 1 the pieces of the answers come mixed; `Piece.index` tells them apart. Where an answer ends
        early, its last piece comes all the same, and its error is raised once every answer has ended.
        """
        request_id = request_id or new_request_id()
        request = generate_request(prompt, messages, images, request_id, options)
        call = self._stub.ModelStreamInfer(iter([request]), timeout=timeout_s or self.timeout_s)
        self._open[request_id] = call
        progress, over = Progress(count_of(options)), False
        try:
            for response in call:
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

    def stop(self, request_id: str) -> bool:
        """End a request wherever it was sent from; False where the server knows none of that name.

        Raises:
            ServerUnavailableError: nobody answers.
        """
        try:
            call = self._stop_call(stop_request(request_id), timeout=STOP_TIMEOUT_S)
            pieces = [read_piece(response) for response in call]
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from error
        return any(piece is not None and piece.finish_reason == STOPPED for piece in pieces)

    def session(self, name: str, action: SessionAction = "show", *, cache_salt: str = "") -> SessionState:
        """What the KV cache holds of a session (the requests that named it), after it was pinned, saved, restored …

        Raises:
            SessionNotFoundError: nothing is kept of it.
            UnsupportedFeatureError: the server has no KV cache, or none on disk to save to.
            WiCoreError: as the class says.
        """
        try:
            call = self._stop_call(
                session_request(name, action, cache_salt, new_request_id()), timeout=SESSION_TIMEOUT_S
            )
            return session_state([read_piece(response) for response in call])
        except grpc.RpcError as error:
            raise from_rpc(error, self.address) from error

    def _leave(self, request_id: str) -> None:
        """Stop a request, unless somebody did. One stop is enough: the decoder remembers one that comes too early."""
        call = self._open.pop(request_id, None)
        if call is None:
            return
        try:
            self.stop(request_id)
        except (WiCoreError, ValueError):
            pass  # a server that has gone, or a closed connection, has no request to stop
        finally:
            call.cancel()


_CLIENTS: weakref.WeakSet[Client] = weakref.WeakSet()


@atexit.register
def _close_clients() -> None:
    for client in list(_CLIENTS):
        client.close()
