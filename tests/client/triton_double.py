"""A gRPC server that speaks Triton's protocol and answers as the test says: the client's real wire, no real model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from python_backends import contract

Response = service_pb2.ModelStreamInferResponse
NUMPY = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_, "UINT8": np.uint8}


def values_of(request: service_pb2.ModelInferRequest) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs by name, decoded as Triton would; fails where a tensor is not what the contract says."""
    model = contract.MODELS[request.model_name]
    found = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        declared = model.input(tensor.name)
        expected = "BYTES" if declared.dtype == "TYPE_STRING" else declared.dtype.removeprefix("TYPE_")
        assert tensor.datatype == expected, tensor.name
        flat = deserialize_bytes_tensor(raw) if expected == "BYTES" else np.frombuffer(raw, NUMPY[expected])
        assert len(tensor.shape) == 1 + len(declared.dims)
        found[tensor.name] = flat.reshape(tuple(tensor.shape))
    return found


def piece(
    text: str, tokens: tuple[int, ...] = (7,), reason: str = "", error: str = "", index: int = 0, **written: Any
) -> Response:
    """One response of the ensemble; ``written`` are outputs that hold JSON."""
    usage = '{"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": {"device": 0}}' if reason else ""
    values = {
        "text_output": text,
        "token_ids": np.array(tokens, np.int32),
        "index": np.full(1, index, np.int32),
        "finish_reason": reason,
        "tool_calls": "",
        "top_logprobs": "",
        "prompt_token_logprobs": "",
        "usage": usage,
        "token_logprobs": np.full(len(tokens), -0.5, np.float32),
        "error_code": error,
        **{name: json.dumps(value) for name, value in written.items()},
    }
    assert values.keys() == {tensor.name for tensor in contract.ANSWER}
    response = Response()
    for name, value in values.items():
        is_text = isinstance(value, str)
        array = np.array([[value.encode()]], np.object_) if is_text else value[np.newaxis]
        raw = serialize_byte_tensor(array).item() if is_text else array.tobytes()
        datatype = "BYTES" if is_text else "INT32" if array.dtype == np.int32 else "FP32"
        response.infer_response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        response.infer_response.raw_output_contents.append(raw)
    return response


@dataclass
class TritonDouble(service_pb2_grpc.GRPCInferenceServiceServicer):
    """`answer` makes the responses to a request of the ensemble; stops are kept, in order, in `stopped`."""

    answer: Callable[[dict[str, Any]], Iterator[Response]]
    stopped: list[str] = field(default_factory=list)
    stop_seen: threading.Event = field(default_factory=threading.Event)
    peers: set[str] = field(default_factory=set)
    address: str = ""

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=request.name == contract.ENSEMBLE)

    def ModelStreamInfer(self, requests: Any, context: grpc.ServicerContext) -> Iterator[Response]:  # noqa: N802
        self.peers.add(context.peer())
        for request in requests:
            values = values_of(request)
            if request.model_name == contract.DECODER:
                yield self._stop(values)
            else:
                yield from self.answer(values)

    def _stop(self, values: dict[str, Any]) -> Response:
        assert values["command"].item() == b"stop"
        self.stopped.append(values["request_id"].item().decode())
        self.stop_seen.set()
        return piece("", (), "stop")


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Iterator[Response]], port: int = 0) -> Iterator[TritonDouble]:
    """The double on that port, or on a free one."""
    double = TritonDouble(answer)
    server = grpc.server(futures.ThreadPoolExecutor(32))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(double, server)
    double.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield double
    finally:
        server.stop(None).wait()


def counting(values: dict[str, Any]) -> Iterator[Response]:
    """Two pieces and an end."""
    yield piece("Hello", (1,))
    yield piece(" world", (2,), "stop")


def endless(values: dict[str, Any]) -> Iterator[Response]:
    """A piece every millisecond or so, for much longer than any test."""
    pause = threading.Event()
    for number in range(100_000):
        yield piece(f"{number} ", (number,))
        pause.wait(0.001)
