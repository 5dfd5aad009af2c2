"""A call to the decoder that is open as long as this process lives (`python_backends.decoder.lines`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import Any

import grpc

from client.answer import read_piece
from client.request import infer_request
from python_backends import contract
from python_backends.errors import WiCoreError

log = logging.getLogger("wicore.gateway")

RETRY_S = 0.5


class Line:
    """Held in a task of its own, and opened anew where the server was started again.

    Requests that name it (`contract.LINE`) are stopped by the decoder when it ends, also where this process was killed.
    """

    def __init__(self, stub: Any) -> None:
        self.name = ""
        """Of the line that is open; empty while there is none."""
        self._stub = stub
        self._refused = ""
        """Why the last was not opened: said once, not with every try."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to hold it."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Let it go."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            await self._hold(secrets.token_hex(16))
            await asyncio.sleep(RETRY_S)

    async def _hold(self, name: str) -> None:
        """Until it breaks."""
        values = {"command": "line", "request_id": name, "stream": True}
        request = infer_request(contract.MODELS[contract.DECODER], values, "wicore-line")
        call = self._stub.ModelStreamInfer(iter([request]), wait_for_ready=True)
        try:
            async for response in call:
                piece = read_piece(response)
                if piece is not None and not piece.finish_reason:
                    self.name, self._refused = name, ""
        except WiCoreError as error:
            if error.message != self._refused:
                log.warning("the decoder opens no line: %s", error.message)
            self._refused = error.message
        except grpc.RpcError:
            pass  # the server has gone; there will be another
        finally:
            self.name = ""
            call.cancel()
