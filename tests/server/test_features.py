"""Request features through a real server: forms of an answer, several answers, log-probabilities, penalties."""

from __future__ import annotations

import json

from client import Client

TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "star"]}, "large": {"type": "boolean"}},
    "required": ["shape", "large"],
    "additionalProperties": False,
}


def test_an_answer_keeps_to_a_choice_and_to_a_schema(client: Client) -> None:
    choice = client.generate("Hello", response_format={"type": "choice", "choice": ["yes", "no"]})
    assert choice.text in {"yes", "no"}
    assert choice.finish_reason == "stop"
    schema = {"type": "json_schema", "json_schema": {"name": "found", "schema": SCHEMA}}
    found = json.loads(client.generate("Hello", response_format=schema, max_tokens=200).text)
    assert found["shape"] in {"circle", "star"}
    assert isinstance(found["large"], bool)


def test_a_demanded_tool_call_arrives_as_one(client: Client) -> None:
    answer = client.generate("Hello", tools=[TOOL], tool_choice="required", max_tokens=200)
    assert answer.finish_reason == "tool_calls"
    assert all(call.name == "paint" for call in answer.tool_calls)
    assert json.loads(answer.tool_calls[0].arguments)["colour"] in {"red", "blue"}
    assert answer.text == ""


def test_the_same_seed_gives_the_same_answers_alone_or_together(client: Client) -> None:
    sampling = {"temperature": 1.5, "max_tokens": 12}
    together = client.generate_n("Hello", n=3, seed=20, **sampling)
    alone = [client.generate("Hello", seed=20 + index, **sampling) for index in range(3)]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_log_probabilities_and_bias(client: Client) -> None:
    plain = client.generate("Hello", logprobs=2, prompt_logprobs=1, max_tokens=3)
    assert plain.prompt_logprobs is not None
    assert len(plain.prompt_logprobs.token_ids) == plain.usage.prompt_tokens - 1
    forced = client.generate("Hello", logit_bias={300: 100.0}, max_tokens=3)
    assert list(forced.token_ids) == [300, 300, 300]
