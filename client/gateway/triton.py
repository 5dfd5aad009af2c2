"""Triton as the gateway sees it: answers through the client library, and questions about its state."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from client import AsyncClient
from client.answer import from_rpc, read_piece
from client.calls import CHANNEL_OPTIONS
from client.gateway.line import Line
from client.request import infer_request
from python_backends import contract
from python_backends.errors import (
    ImagesNotSupportedError,
    InvalidImageError,
    ServerUnavailableError,
    WiCoreError,
)

PROBE_TIMEOUT_S = 5.0
PROBE_AGE_S = 1.0
"""How old what is known of the stages may be when it is asked for."""


class Triton:
    """One server. Make it and use it within one event loop.

    Args:
        address: gRPC ``host:port``.
        timeout_s: bounds every answer as a whole.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self.client = AsyncClient(address, timeout_s)
        self._address = address
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self.line = Line(self._stub)
        """For requests to end with this process; until it is started, they do not."""
        self._probing = asyncio.Lock()
        self._stages: dict[str, str] = {}
        self._probed_s = float("-inf")

    async def close(self) -> None:
        """Deliver stops that are on their way, then close the connections."""
        await self.client.close()
        await self.line.close()
        await self._channel.close()

    async def stats(self) -> dict[str, Any]:
        """The decoder's own account of itself (`Engine.snapshot`).

        Raises:
            ServerUnavailableError, DeadlineExceededError: it does not answer.
        """
        request = infer_request(contract.MODELS[contract.DECODER], {"command": "stats"}, "wicore-stats")
        try:
            call = self._stub.ModelStreamInfer(iter([request]), timeout=PROBE_TIMEOUT_S)
            pieces = [read_piece(response) async for response in call]
        except grpc.RpcError as error:
            raise from_rpc(error, self._address) from error
        found = next((piece for piece in pieces if piece is not None), None)
        if found is None:
            raise ServerUnavailableError("the decoder gave no statistics; see the server's log")
        values: dict[str, Any] = json.loads(found.text)
        return values

    async def stages(self) -> Mapping[str, str]:
        """For each stage an empty string where its process answers, else why not.

        Each does a little work of its own for this: Triton goes on calling a model ready whose process is dead.
        """
        async with self._probing:  # any number of callers, one probe
            if time.monotonic() - self._probed_s > PROBE_AGE_S:
                probes = (self._tokenizer(), self._image_processor(), self._vision_encoder(), self.stats())
                results = await asyncio.gather(*probes, return_exceptions=True)
                self._stages = {stage: _reason(result) for stage, result in zip(contract.STAGES, results, strict=True)}
                self._probed_s = time.monotonic()
        return self._stages

    async def _tokenizer(self) -> None:
        await self._infer(contract.TOKENIZER, {"text_input": "."})

    async def _image_processor(self) -> None:
        await self._infer(contract.IMAGE_PROCESSOR, {contract.IMAGE_BYTES.name: []})

    async def _vision_encoder(self) -> None:
        """Pixels of a size that no model takes: the stage itself refuses them, which costs next to nothing."""
        with contextlib.suppress(InvalidImageError, ImagesNotSupportedError):
            await self._infer(contract.VISION_ENCODER, {contract.VISION_PIXELS.name: [[[0]]] * 3})

    async def _infer(self, model: str, values: Mapping[str, Any]) -> None:
        request = infer_request(contract.MODELS[model], values, f"wicore-probe-{model}")
        try:
            await self._stub.ModelInfer(request, timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc(error, self._address) from error


def _reason(result: object) -> str:
    if isinstance(result, WiCoreError):
        return result.message
    if isinstance(result, BaseException):
        raise result
    return ""
