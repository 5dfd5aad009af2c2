"""langchain-openai, as its documentation uses it, against the real server."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, Literal

import httpx
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from builders.demo.evaluate import sample_picture
from client import Client
from client.server.gateway import Gateway
from tests.server.gateway.conftest import MODEL
from tests.server.gateway.test_abuse import wait_for
from tests.server.gateway.test_openai_sdk import data_url


def chat_at(gateway: Gateway, **more: Any) -> ChatOpenAI:
    key = SecretStr("none")
    return ChatOpenAI(model=MODEL, base_url=f"{gateway.address}/v1", api_key=key, max_retries=0, temperature=0, **more)


@pytest.fixture
def chat(gateway: Gateway) -> ChatOpenAI:
    return chat_at(gateway)


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


class Shape(BaseModel):
    colour: Literal["red", "green", "blue"]
    count: Literal[1, 2, 3]


def test_structured_output_is_an_instance(chat: ChatOpenAI) -> None:
    assert isinstance(chat.with_structured_output(Shape, method="json_schema").invoke("A shape?"), Shape)


def test_batches_run_together(chat: ChatOpenAI) -> None:
    answers = chat.bind(max_tokens=4).batch([f"{number}?" for number in range(8)])
    assert len(answers) == 8
    assert all(answer.response_metadata["model_name"] == MODEL for answer in answers)


async def tour(gateway: Gateway) -> tuple[str, str, int, Any]:
    """The same question whole and streamed; several at once; and one that must have a form."""
    async with httpx.AsyncClient() as connections:  # langchain's own is never closed
        chat = chat_at(gateway, http_async_client=connections)
        several = chat.bind(max_tokens=4).abatch([f"{number}?" for number in range(4)])
        whole, streamed, answers = await asyncio.gather(chat.ainvoke("Hi"), collected(chat), several)
        formed = await chat.with_structured_output(Shape, method="json_schema").ainvoke("A shape?")
    return str(whole.content), streamed, len(answers), formed


async def collected(chat: ChatOpenAI) -> str:
    return "".join([str(chunk.content) async for chunk in chat.astream("Hi")])


def test_async_answers_are_the_blocking_ones(gateway: Gateway, chat: ChatOpenAI) -> None:
    whole, streamed, several, formed = asyncio.run(tour(gateway))
    assert whole == streamed == chat.invoke("Hi").content
    assert several == 4
    assert isinstance(formed, Shape)


async def leave_a_stream(gateway: Gateway, http: httpx.Client) -> None:
    async with httpx.AsyncClient() as connections:
        body = {"ignore_eos": True, "temperature": 2.0}
        chat = chat_at(gateway, max_tokens=5000, http_async_client=connections, extra_body=body)
        async with aclosing(chat.astream("Hi")) as stream:
            await anext(stream)
            wait_for(http, 1)


def test_who_leaves_an_async_stream_is_stopped_in_the_engine(gateway: Gateway, http: httpx.Client) -> None:
    wait_for(http, 0)
    asyncio.run(leave_a_stream(gateway, http))
    wait_for(http, 0)
