"""What the client sends is what the contract declares."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from client.request import encoded, generate_request, infer_request, stop_request
from python_backends import contract
from python_backends.errors import (
    EmptyPromptError,
    InvalidImageError,
    InvalidMessagesError,
    InvalidParameterError,
    InvalidTextError,
)
from tests.client.triton_double import values_of

ENSEMBLE = contract.MODELS[contract.ENSEMBLE]


def sent(prompt: str | None = "Hi", messages: Any = None, images: Any = (), **options: Any) -> dict[str, Any]:
    return values_of(generate_request(prompt, messages, images, "id", options))


@given(st.text())
def test_any_text_arrives_as_it_was(text: str) -> None:
    assert sent(text)["text_input"].item().decode() == text


@given(
    max_tokens=st.integers(1, 2**31 - 1),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.floats(0, 100, width=32),
    stop=st.lists(st.text(min_size=1), max_size=4),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=4),
    ignore_eos=st.booleans(),
    min_tokens=st.integers(0, 2**31 - 1),
    n=st.integers(1, 64),
    logprobs=st.integers(0, 20),
    prompt_logprobs=st.integers(0, 20),
    min_p=st.floats(0, 1, width=32),
    repetition_penalty=st.floats(0.01171875, 100, width=32),
    frequency_penalty=st.floats(-2, 2, width=32),
    priority=st.integers(-1000, 1000),
)
def test_options_keep_their_values(stop: list[str], stop_token_ids: list[int], **scalars: Any) -> None:
    values = sent(stop=stop, stop_token_ids=stop_token_ids, **scalars)
    for name, value in scalars.items():
        assert values[name].shape == (1, 1)
        assert values[name].item() == value
    assert [item.decode() for item in values["stop"][0]] == stop
    assert values["stop_token_ids"].shape == (1, len(stop_token_ids))
    assert values["stop_token_ids"][0].tolist() == stop_token_ids


def test_what_is_left_out_is_not_sent() -> None:
    assert set(sent(max_tokens=None)) == {"text_input", "stream", "request_id"}


def test_messages_travel_as_json_with_their_characters() -> None:
    messages = [{"role": "user", "content": "图中有什么？"}]
    assert json.loads(sent(None, messages)["messages"].item()) == messages


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
).filter(lambda value: value is not None)


@given(st.sampled_from(["tools", "tool_choice", "response_format"]), JSON_VALUES)
def test_structures_travel_as_json(name: str, value: Any) -> None:
    assert json.loads(sent(**{name: value})[name].item()) == value


def test_a_mode_of_tool_choice_is_json_too() -> None:
    assert sent(tool_choice="auto")["tool_choice"].item() == b'"auto"'


def test_any_mapping_and_sequence_may_be_part_of_a_structure() -> None:
    messages = ({"role": "user", "content": (MappingProxyType({"type": "text", "text": "Hi"}),)},)
    assert json.loads(sent(None, messages)["messages"].item()) == [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    ]


@given(st.dictionaries(st.integers(0, 2**31), st.floats(-100, 100)))
def test_biases_travel_by_token_ids(biases: dict[int, float]) -> None:
    by_numpy = {np.int64(token): np.float64(bias) for token, bias in biases.items()}
    for given_as in (biases, by_numpy, {str(token): bias for token, bias in biases.items()}):
        found = json.loads(sent(logit_bias=given_as)["logit_bias"].item())
        assert {int(token): bias for token, bias in found.items()} == biases


def test_pictures_travel_as_files_bytes(tmp_path: Path) -> None:
    picture = Image.new("RGB", (5, 4), "red")
    path = tmp_path / "picture.png"
    picture.save(path)
    data = path.read_bytes()
    images = sent(images=[str(path), path, data, picture])["image"]
    assert images.shape == (1, 4)
    assert images[0, :3].tolist() == [data] * 3
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(images[0, 3]))), np.asarray(picture))


def test_a_stop_goes_to_the_decoder() -> None:
    request = stop_request("abc")
    assert request.model_name == contract.DECODER
    assert {name: value.item() for name, value in values_of(request).items()} == {
        "request_id": b"abc",
        "command": b"stop",
    }


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_tokens": 2**31}, "does not fit int32"),
        ({"max_tokens": 1.5}, "does not fit int32"),
        ({"seed": -1}, "seed"),
        ({"temperature": "warm"}, "temperature cannot be 'warm'"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"tempreature": 1.0}, "did you mean temperature"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias cannot be written"),
        ({"logit_bias": {5.5: 1.0}}, "logit_bias must have numbers by token ids"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias must have numbers by token ids"),
        ({"logit_bias": {5: "much"}}, "logit_bias must have numbers by token ids"),
        ({"logit_bias": [5]}, "logit_bias must have numbers by token ids"),
        ({"tools": [{1, 2}]}, "tools cannot be written as JSON: set"),
        ({"tools": [b"a"]}, "tools cannot be written as JSON: bytes"),
        ({"n": 1.5}, "n cannot be 1.5"),
        ({"n": "several"}, "n cannot be 'several'"),
    ],
)
def test_values_that_cannot_be_sent_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidParameterError, match=match):
        sent(**options)


def test_half_of_a_surrogate_pair_is_not_text() -> None:
    with pytest.raises(InvalidTextError, match="text_input"):
        sent("\ud800")


def test_a_prompt_or_messages_but_not_both() -> None:
    with pytest.raises(EmptyPromptError):
        sent(None)
    with pytest.raises(EmptyPromptError):
        sent("Hi", [{"role": "user", "content": "Hi"}])


def test_messages_that_json_cannot_hold_are_refused() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for content in ({1, 2}, nested):
        with pytest.raises(InvalidMessagesError, match="messages cannot be written as JSON"):
            sent(None, [{"role": "user", "content": content}])


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidImageError, match=r"nothing\.png"):
        encoded("nothing.png")


def test_every_input_of_the_contract_can_be_sent() -> None:
    samples = {"TYPE_STRING": "x", "TYPE_BOOL": True, "TYPE_FP32": 0.5}
    values = {tensor.name: samples.get(tensor.dtype, 3) for tensor in ENSEMBLE.inputs}
    decoded = values_of(infer_request(ENSEMBLE, values, "id"))
    assert set(decoded) == {tensor.name for tensor in ENSEMBLE.inputs}
