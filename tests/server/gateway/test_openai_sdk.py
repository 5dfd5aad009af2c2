"""A tour of the API with OpenAI's own Python client, against the real server."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image
from pydantic import BaseModel

from builders.demo.evaluate import sample_picture
from client import Client
from client.gateway.openai.responses import ChatChunk, ChatCompletion
from client.server.gateway import Gateway
from tests.server.gateway.conftest import MODEL

ANY: dict[str, Any] = {"ignore_eos": True}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


@pytest.fixture
def sdk(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.address}/v1", api_key="none", max_retries=0, timeout=60) as connected:
        yield connected


def data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def user(text: str, *pictures: Image.Image) -> list[Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]


def test_a_picture_is_answered_as_over_grpc(sdk: OpenAI, client: Client) -> None:
    picture, question, _ = sample_picture(1)
    answer = sdk.chat.completions.create(model=MODEL, messages=user(question, picture), max_tokens=128)
    direct = client.generate(question, images=[picture], max_tokens=128)
    assert answer.choices[0].message.content == direct.text
    assert answer.choices[0].finish_reason == direct.finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == direct.usage.prompt_tokens
    assert answer.usage.completion_tokens == direct.usage.completion_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    ChatCompletion.model_validate(answer.model_dump(), strict=True)


def test_several_pictures_are_seen_in_their_places(sdk: OpenAI, client: Client) -> None:
    first, second = sample_picture(0)[0], sample_picture(3)[0]
    said = {"role": "assistant", "content": "Three."}
    ask: dict[str, Any] = {"model": MODEL, "max_tokens": 32}
    answers = []
    for one, two in ((first, second), (second, first)):
        answer = sdk.chat.completions.create(messages=[*user("Count.", one), said, *user("And now?", two)], **ask)
        place = [{"type": "image"}]
        texts = [{"type": "text", "text": text} for text in ("Count.", "And now?")]
        placed = [
            {"role": "user", "content": [*place, texts[0]]},
            said,
            {"role": "user", "content": [*place, texts[1]]},
        ]
        direct = client.generate(messages=placed, images=[one, two], max_tokens=32, logprobs=1)
        assert answer.choices[0].message.content == direct.text
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == direct.usage.prompt_tokens
        answers.append(direct.logprobs)
    assert answers[0] != answers[1], "the order must matter"


def test_a_stream_has_the_same_text_the_role_the_end_and_the_usage(sdk: OpenAI) -> None:
    picture, question, _ = sample_picture(2)
    asked: dict[str, Any] = {"model": MODEL, "messages": user(question, picture), "max_tokens": 24}
    sdk.chat.completions.create(**asked)  # so that both find the same in the cache
    one = sdk.chat.completions.create(**asked)
    chunks = list(sdk.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        ChatChunk.model_validate(chunk.model_dump(exclude_unset=True), strict=True)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == one.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == one.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    without = list(sdk.chat.completions.create(**asked, stream=True))
    assert without[-1].choices


def test_several_answers_are_the_seeds_one_after_another(sdk: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": user("Hi"), "temperature": 2.0, "max_tokens": 8}
    several = sdk.chat.completions.create(**asked, n=3, seed=5, extra_body=ANY)
    alone = [sdk.chat.completions.create(**asked, seed=5 + place, extra_body=ANY) for place in range(3)]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in several.choices]
    assert texts == [each.choices[0].message.content for each in alone]
    assert several.usage is not None
    assert several.usage.completion_tokens == 24
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    for chunk in sdk.chat.completions.create(**asked, n=3, seed=5, extra_body=ANY, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts


def test_async_streams_run_beside_one_another(gateway: Gateway) -> None:
    async def one(connected: AsyncOpenAI, number: int) -> int:
        stream = await connected.chat.completions.create(
            model=MODEL, messages=user(f"{number}?"), max_tokens=24, stream=True, extra_body=ANY
        )
        return sum([1 async for chunk in stream if chunk.choices[0].delta.content])

    async def run() -> list[int]:
        async with AsyncOpenAI(base_url=f"{gateway.address}/v1", api_key="none", max_retries=0) as connected:
            return await asyncio.gather(*(one(connected, number) for number in range(24)))

    assert all(count > 1 for count in asyncio.run(run()))


def test_log_probabilities_name_tokens_by_text_and_bytes(sdk: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": user("How many shapes?"), "max_tokens": 6}
    choice = sdk.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-4), "greedy draws the likeliest"
        assert token.token == bytes(token.bytes or []).decode(errors="replace")
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-4
    assert "".join(token.token for token in content).startswith(choice.message.content or "-")
    plain = sdk.chat.completions.create(**asked, logprobs=True).choices[0]
    assert plain.logprobs is not None
    assert plain.logprobs.content is not None
    assert [token.logprob for token in plain.logprobs.content] == pytest.approx([token.logprob for token in content])
    assert sdk.chat.completions.create(**asked).choices[0].logprobs is None
    streamed = [
        token.logprob
        for chunk in sdk.chat.completions.create(**asked, logprobs=True, stream=True)
        for token in (chunk.choices[0].logprobs.content or [] if chunk.choices[0].logprobs else [])
    ]
    assert streamed == pytest.approx([token.logprob for token in content])


def test_a_tool_is_called_and_its_result_taken(sdk: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "tools": [WEATHER], "max_tokens": 64}
    named = {"type": "function", "function": {"name": "get_weather"}}
    messages = user("Weather in Paris?")
    for choice in ("required", named):
        answer = sdk.chat.completions.create(**asked, messages=messages, tool_choice=choice).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.tool_calls is not None
        call = answer.message.tool_calls[0]
        assert call.type == "function"
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    messages = [*messages, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}]
    final = sdk.chat.completions.create(**asked, messages=messages, tool_choice="none").choices[0]
    assert final.finish_reason in ("stop", "length")
    assert not final.message.tool_calls


def test_a_streamed_call_comes_whole(sdk: OpenAI) -> None:
    with sdk.chat.completions.stream(
        model=MODEL, messages=user("Weather?"), tools=[WEATHER], tool_choice="required", max_tokens=64
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls
    assert "city" in json.loads(final.message.tool_calls[0].function.arguments)


def test_without_parallel_calls_there_is_one(sdk: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": user("Weather in Paris and Rome?"),
        "tools": [WEATHER],
        "tool_choice": "required",
        "temperature": 3.0,
        "max_tokens": 200,
    }
    counts = []
    for seed in range(12):
        answer = sdk.chat.completions.create(**asked, seed=seed, parallel_tool_calls=True).choices[0].message
        counts.append(len(answer.tool_calls or []))
        single = sdk.chat.completions.create(**asked, seed=seed, parallel_tool_calls=False).choices[0].message
        assert len(single.tool_calls or []) == min(1, counts[-1])
        if max(counts) > 1:
            break
    assert max(counts) > 1, "the test must see several calls"


def test_a_pydantic_model_is_answered_by_an_instance(sdk: OpenAI) -> None:
    class Shape(BaseModel):
        colour: Literal["red", "green", "blue"]
        count: Literal[1, 2, 3]

    answer = sdk.chat.completions.parse(
        model=MODEL, messages=user("A shape?"), response_format=Shape, temperature=1.5, seed=3, max_tokens=64
    )
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Shape)


def test_any_json_object(sdk: OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model=MODEL,
        messages=user("JSON?"),
        response_format={"type": "json_object"},
        max_tokens=200,
        temperature=1.0,
        seed=1,
        logit_bias={},
    )
    text = answer.choices[0].message.content or ""
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_sampling_settings_reach_the_decoder(sdk: OpenAI, client: Client) -> None:
    asked: dict[str, Any] = {"temperature": 1.3, "top_p": 0.9, "seed": 11, "max_tokens": 12}
    penalties: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.7}
    extra: dict[str, Any] = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True, "priority": 3}
    bias = {"300": -5.0}
    answer = sdk.chat.completions.create(
        model=MODEL, messages=user("Hello"), **asked, **penalties, logit_bias=bias, extra_body=extra
    )
    direct = client.generate("Hello", **asked, **penalties, **extra, logit_bias={300: -5.0})
    assert answer.choices[0].message.content == direct.text
    renamed = {**asked, "max_completion_tokens": asked["max_tokens"], "max_tokens": 1}
    again = sdk.chat.completions.create(
        model=MODEL, messages=user("Hello"), **renamed, **penalties, logit_bias=bias, extra_body=extra
    )
    assert again.choices[0].message.content == direct.text


def test_a_stop_string_ends_the_answer_before_it(sdk: OpenAI, client: Client) -> None:
    text = client.generate("How many shapes?", max_tokens=24, ignore_eos=True).text
    stop = text[4:7]
    answer = sdk.chat.completions.create(
        model=MODEL, messages=user("How many shapes?"), max_tokens=24, stop=[stop], extra_body=ANY
    ).choices[0]
    assert answer.message.content == text[: text.index(stop)]
    assert answer.finish_reason == "stop"


def test_text_completions(sdk: OpenAI, client: Client) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "extra_body": ANY}
    expected = [client.generate(text, max_tokens=8, ignore_eos=True).text for text in ("One", "Two")]
    both = sdk.completions.create(prompt=["One", "Two"], **asked)
    assert [choice.text for choice in both.choices] == expected
    assert both.usage is not None
    assert both.usage.completion_tokens == 16
    chunks = sdk.completions.create(prompt="One", stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected[0]
    logprobs = sdk.completions.create(prompt="One", logprobs=2, **asked).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs or []) == len(logprobs.top_logprobs or []) == 8
    assert "One" in sdk.completions.create(prompt="One", echo=True, **asked).choices[0].text


def test_models(sdk: OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == [MODEL]
    assert sdk.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "use 'demo'"),
        ({"temperature": -1}, openai.BadRequestError, "temperature is -1"),
        ({"temperature": "hot"}, openai.UnprocessableEntityError, "temperature"),
        ({"messages": []}, openai.UnprocessableEntityError, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, openai.UnprocessableEntityError, "role"),
        ({"messages": [{"role": "user", "content": " "}]}, openai.BadRequestError, "no text"),
        ({"n": 1000}, openai.BadRequestError, "n is 1000"),
        ({"extra_body": {"max_token": 1}}, openai.UnprocessableEntityError, "max_token is not a parameter"),
        ({"response_format": {"type": "xml"}}, openai.BadRequestError, "xml"),
        ({"tool_choice": "required"}, openai.BadRequestError, "needs tools"),
        ({"top_logprobs": 2}, openai.BadRequestError, "logprobs: true"),
        ({"messages": [{"role": "user", "content": "a" * 200_000}]}, openai.BadRequestError, "tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said_with_its_status(
    sdk: OpenAI, changes: dict[str, Any], error: type[openai.APIStatusError], says: str, stream: bool
) -> None:
    asked = {"model": MODEL, "messages": user("Hi"), "max_tokens": 2, "stream": stream, **changes}
    with pytest.raises(error) as caught:
        sdk.chat.completions.create(**asked)
    assert says in caught.value.message
    assert caught.value.code
    assert caught.value.request_id


def test_embeddings_are_refused_in_words(sdk: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="makes no embeddings") as caught:
        sdk.embeddings.create(model=MODEL, input="x")
    assert caught.value.code == "unsupported"


def test_a_deadline_has_its_status_alone_and_in_a_stream(sdk: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": user("Hi"), "max_tokens": 5000}
    extra = {**ANY, "deadline_ms": 100}
    with pytest.raises(openai.InternalServerError) as caught:
        sdk.chat.completions.create(**asked, extra_body=extra)
    assert caught.value.status_code == 504
    stream = sdk.chat.completions.create(**asked, extra_body=extra, stream=True)
    assert next(stream).choices
    with pytest.raises(openai.APIError) as failed:
        list(stream)
    assert failed.value.code == "deadline_exceeded"
