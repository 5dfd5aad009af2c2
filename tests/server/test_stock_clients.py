"""NVIDIA's clients and curl get the answer that ours gets."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from builders.demo.evaluate import sample_picture
from client import Answer, Client
from client.request import encoded
from client.server import Server
from tests.server.stock import curl, grpc_stream, token_ids

PICTURE, QUESTION, _ = sample_picture(1)
PNG = encoded(PICTURE)
TOKENS = 24


@pytest.fixture(scope="module")
def ours(client: Client) -> Answer:
    return client.generate(QUESTION, images=[PNG], max_tokens=TOKENS)


def test_tritonclient_over_a_stream(server: Server, ours: Answer) -> None:
    results, error = grpc_stream(
        server.addresses.grpc, text_input=QUESTION, image=[PNG], max_tokens=TOKENS, stream=True
    )
    assert error == ""
    assert len(results) > 1
    assert token_ids(results) == list(ours.token_ids)
    assert b"".join(result.as_numpy("text_output").item() for result in results).decode() == ours.text
    reasons = [result.as_numpy("finish_reason").item().decode() for result in results]
    assert reasons == [""] * (len(results) - 1) + [ours.finish_reason]
    assert np.allclose([p for r in results for p in r.as_numpy("token_logprobs")[0]], ours.logprobs, atol=1e-4)


def test_tritonclient_without_streaming_gets_one_response(server: Server, ours: Answer) -> None:
    results, _ = grpc_stream(server.addresses.grpc, text_input=QUESTION, image=[PNG], max_tokens=TOKENS)
    assert [result.as_numpy("text_output").item().decode() for result in results] == [ours.text]
    assert token_ids(results) == list(ours.token_ids)


def body(*, stream: bool) -> dict[str, object]:
    image = base64.b64encode(PNG).decode()
    return {"text_input": QUESTION, "image": [image], "max_tokens": TOKENS, "stream": stream}


def test_curl_generate(server: Server, ours: Answer) -> None:
    status, text = curl(f"{server.addresses.http}/v2/models/gemma3/generate", body(stream=False))
    answer = json.loads(text)
    assert status == 200
    assert answer["text_output"] == ours.text
    assert answer["finish_reason"] == ours.finish_reason
    assert json.loads(answer["usage"])["prompt_tokens"] == ours.usage.prompt_tokens


def test_curl_generate_stream(server: Server, ours: Answer) -> None:
    status, text = curl(f"{server.addresses.http}/v2/models/gemma3/generate_stream", body(stream=True))
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
    assert status == 200
    assert len(events) > 1
    assert "".join(event["text_output"] for event in events) == ours.text
    assert events[-1]["finish_reason"] == ours.finish_reason


def test_curl_gets_a_clear_error(server: Server) -> None:
    status, text = curl(f"{server.addresses.http}/v2/models/gemma3/generate", {"text_input": "", "max_tokens": 1})
    assert status >= 400
    assert "empty_prompt: " in json.loads(text)["error"]
    assert "Traceback" not in text
