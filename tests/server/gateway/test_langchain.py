"""langchain-openai, as its documentation uses it, against the real server."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from builders.demo.evaluate import sample_picture
from client import Client
from client.server.gateway import Gateway
from tests.server.gateway.conftest import MODEL
from tests.server.gateway.test_openai_sdk import data_url


@pytest.fixture
def chat(gateway: Gateway) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL, base_url=f"{gateway.address}/v1", api_key=SecretStr("none"), max_retries=0, temperature=0
    )


def test_a_picture_is_answered_as_over_grpc(chat: ChatOpenAI, client: Client) -> None:
    picture, question, _ = sample_picture(1)
    parts: list[str | dict[Any, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(picture)}},
        {"type": "text", "text": question},
    ]
    answer = chat.invoke([HumanMessage(content=parts)])
    direct = client.generate(question, images=[picture], temperature=0)
    assert answer.content == direct.text
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == direct.usage.completion_tokens
    streamed = [chunk.content for chunk in chat.stream([HumanMessage(content=parts)])]
    assert "".join(str(part) for part in streamed) == direct.text


def test_a_bound_tool_is_called_and_answered(chat: ChatOpenAI) -> None:
    class GetWeather(BaseModel):
        """The weather of a city."""

        city: Literal["Paris", "Rome"]

    bound = chat.bind_tools([GetWeather], tool_choice="GetWeather")
    asked = HumanMessage("Weather in Rome?")
    answer = bound.invoke([asked])
    (call,) = answer.tool_calls
    assert call["name"] == "GetWeather"
    assert GetWeather(**call["args"])
    final = chat.bind(max_tokens=8).invoke([asked, answer, ToolMessage("18 degrees", tool_call_id=call["id"])])
    assert not final.tool_calls


def test_structured_output_is_an_instance(chat: ChatOpenAI) -> None:
    class Shape(BaseModel):
        colour: Literal["red", "green", "blue"]
        count: Literal[1, 2, 3]

    assert isinstance(chat.with_structured_output(Shape, method="json_schema").invoke("A shape?"), Shape)


def test_batches_run_together(chat: ChatOpenAI) -> None:
    answers = chat.bind(max_tokens=4).batch([f"{number}?" for number in range(8)])
    assert len(answers) == 8
    assert all(answer.response_metadata["model_name"] == MODEL for answer in answers)
