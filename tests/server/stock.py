"""NVIDIA's own clients, as their documentation uses them."""

from __future__ import annotations

import json
import queue
import subprocess
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient

from python_backends import contract

NUMPY = {"TYPE_INT32": np.int32, "TYPE_FP32": np.float32, "TYPE_BOOL": np.bool_, "TYPE_UINT64": np.uint64}


def as_input(name: str, value: Any) -> grpcclient.InferInput:
    """[1, n] with the dtype that the contract names; bytes are sent as they are."""
    dtype = contract.MODELS[contract.ENSEMBLE].input(name).dtype
    values = value if isinstance(value, list) else [value]
    if dtype == "TYPE_STRING":
        array = np.array([[item if isinstance(item, bytes) else item.encode() for item in values]], np.object_)
    else:
        array = np.array([values], NUMPY[dtype])
    tensor = grpcclient.InferInput(name, array.shape, "BYTES" if dtype == "TYPE_STRING" else dtype[5:])
    tensor.set_data_from_numpy(array)
    return tensor


def grpc_stream(address: str, **inputs: Any) -> tuple[list[grpcclient.InferResult], str]:
    """All responses to one request over a stream, and the error's text."""
    arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
    results, error = [], ""
    with grpcclient.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: arrived.put((result, error)))
        client.async_stream_infer(
            contract.ENSEMBLE,
            [as_input(name, value) for name, value in inputs.items()],
            enable_empty_final_response=True,
        )
        while True:
            result, failure = arrived.get(timeout=60)
            if failure:
                error = failure.message()
                break
            if result.get_response().outputs:
                results.append(result)
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
        client.stop_stream()
    return results, error


def token_ids(results: list[grpcclient.InferResult]) -> list[int]:
    """Of a whole answer."""
    return [int(token) for result in results for token in result.as_numpy("token_ids").reshape(-1)]


def curl(url: str, body: str | dict[str, Any]) -> tuple[int, str]:
    """Status and body of a POST by the real curl; the body goes through standard input, as it may be large."""
    data = body if isinstance(body, str) else json.dumps(body)
    command = ["curl", "--silent", "--max-time", "60", "--write-out", "\n%{http_code}", "--data-binary", "@-", url]
    done = subprocess.run(command, input=data, capture_output=True, text=True, check=True)
    text, _, status = done.stdout.rpartition("\n")
    return int(status), text
