"""Tools in a conversation: what Gemma's template makes of functions, earlier calls and their results."""

from __future__ import annotations

import functools
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from python_backends import chat, errors
from python_backends.decoder.tools import read_request, render_tools
from python_backends.pixels import ImageLimits
from python_backends.prompt import ImageTokens, PromptTokenizer
from tests.paths import DEMO_CHECKPOINT, ROOT

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = json.dumps([WEATHER, NOW])
FUNCTIONS = render_tools(*read_request(TOOLS, ""))
QUESTION = {"role": "user", "content": "Rain in Rome?"}


@functools.cache
def tokenizer() -> PromptTokenizer:
    images = ImageTokens(64, None, ImageLimits(2**20, 2**20), max_images=4)
    return PromptTokenizer(DEMO_CHECKPOINT, vocab_size=1024, max_context_length=10**6, images=images)


@functools.cache
def reference() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_CHECKPOINT)


def ids(
    messages: Sequence[Any], *, tools: str = "", choice: str = "", images: Sequence[bytes] = (), text: str = ""
) -> list[int]:
    sent = [[value.encode()] if value else [] for value in (text, tools, choice)]
    written = [json.dumps(messages).encode()] if messages else []
    found: list[int] = tokenizer()(sent[0], written, images, sent[1], sent[2]).input_ids.tolist()
    return found


def prompt(*turns: tuple[str, str]) -> list[int]:
    """Token ids of turns (role as Gemma writes it, text) and of the model's open turn."""
    text = "".join(f"<start_of_turn>{role}\n{content}<end_of_turn>\n" for role, content in turns)
    found: list[int] = reference()(text + "<start_of_turn>model\n")["input_ids"]
    return found


def calls(*entries: tuple[str, str, str], **more: Any) -> dict[str, Any]:
    listed = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, name, arguments in entries
    ]
    return {"role": "assistant", "content": None, "tool_calls": listed, **more}


def result(call_id: str, content: Any = "rain") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


ROME = calls(("1", "weather", '{"city": "Rome"}'))
ROME_WRITTEN = '{"name": "weather", "parameters": {"city": "Rome"}}'
TWO = calls(("1", "weather", '{"city": "Rome"}'), ("2", "now", ""))


@pytest.mark.parametrize("system", ["system", "developer"])
def test_functions_stand_between_the_system_text_and_the_question(system: str) -> None:
    assert ids([QUESTION], tools=TOOLS) == prompt(("user", f"{FUNCTIONS}\n\nRain in Rome?"))
    messages = [{"role": system, "content": "Be brief."}, QUESTION, {"role": "assistant", "content": "No."}, QUESTION]
    assert ids(messages, tools=TOOLS) == prompt(
        ("user", f"Be brief.\n\n{FUNCTIONS}\n\nRain in Rome?"), ("model", "No."), ("user", "Rain in Rome?")
    )


def test_a_plain_text_may_use_tools() -> None:
    assert ids([], text="Rain in Rome?", tools=TOOLS) == ids([QUESTION], tools=TOOLS)


def test_the_choice_shapes_what_the_prompt_says() -> None:
    for mode in ("none", '"none"'):
        assert ids([QUESTION], tools=TOOLS, choice=mode) == ids([QUESTION])
    for mode in ("auto", '"auto"', "null"):
        assert ids([QUESTION], tools=TOOLS, choice=mode) == ids([QUESTION], tools=TOOLS)
    for choice in ("required", '{"type": "function", "function": {"name": "now"}}'):
        demand = render_tools(*read_request(TOOLS, choice))
        assert demand != FUNCTIONS
        assert ids([QUESTION], tools=TOOLS, choice=choice) == prompt(("user", f"{demand}\n\nRain in Rome?"))


def test_a_call_is_the_models_turn_and_its_result_the_next_user_turn() -> None:
    expected = (
        ("user", "Rain in Rome?"),
        ("model", ROME_WRITTEN),
        ("user", "```tool_output\nweather: rain\n```"),
    )
    for content in ("rain", [{"type": "text", "text": "rain"}]):
        assert ids([QUESTION, ROME, result("1", content)]) == prompt(*expected)
    after = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Thanks"}]
    assert ids([QUESTION, ROME, result("1"), *after], tools=TOOLS) == prompt(
        ("user", f"{FUNCTIONS}\n\nRain in Rome?"), *expected[1:], ("model", "Yes."), ("user", "Thanks")
    )


def test_what_the_model_said_beside_a_call_is_kept() -> None:
    for content in ("Let me see.", [{"type": "text", "text": "Let me see."}]):
        assert ids([QUESTION, {**ROME, "content": content}, result("1")]) == prompt(
            ("user", "Rain in Rome?"),
            ("model", f"Let me see.\n{ROME_WRITTEN}"),
            ("user", "```tool_output\nweather: rain\n```"),
        )


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (" So? ", "\n\nSo?"),
        ([{"type": "text", "text": " So?"}, {"type": "text", "text": "Now!"}], "\n\nSo?Now!"),
        ("", ""),
    ],
)
def test_results_and_the_users_next_words_share_a_turn(said: Any, shown: str) -> None:
    messages = [QUESTION, TWO, result("2", "noon"), result("1"), {"role": "user", "content": said}]
    results = "```tool_output\nnow: noon\n```\n```tool_output\nweather: rain\n```"
    assert ids(messages) == prompt(
        ("user", "Rain in Rome?"),
        ("model", f'[{ROME_WRITTEN}, {{"name": "now", "parameters": {{}}}}]'),
        ("user", results + shown),
    )


@functools.cache
def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_belong_to_the_users_words_and_not_to_results() -> None:
    marked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Rain in Rome?"}]}]
    rest = [ROME, result("1", "a map: <start_of_image>")]
    beside, placed = ([*first, *rest] for first in ([QUESTION], marked))
    assert ids(beside, images=[png(1)]) == ids(placed, images=[png(1)])
    again = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And here?"}]}
    found = tokenizer()([], [json.dumps([*marked, *rest, again]).encode()], [png(1), png(2)])
    assert found.image_bytes == [png(1), png(2)]
    assert len(found.image_starts) == 2


TEXTS = st.lists(
    st.one_of(
        st.text(max_size=10),
        st.sampled_from(
            ["<", ">", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<image_soft_token>", "<bos>"]
        ),
        st.sampled_from(
            ["<eos>", "\n<start_of_turn>model\n", "\\u003cstart_of_turn>", "<<pad>>", '"', "```", "<mask>"]
        ),
    ),
    max_size=6,
).map("".join)


@settings(deadline=None)
@given(TEXTS, TEXTS, TEXTS)
def test_nothing_that_a_tool_brings_is_a_control_token(description: str, argument: str, content: str) -> None:
    tools = json.dumps([{"type": "function", "function": {"name": "f", "description": description}}])
    found = ids([QUESTION, calls(("1", "f", json.dumps({"x": argument}))), result("1", content)], tools=tools)
    special = [token for token in reference().all_special_ids if token in found]
    named = {name: reference().convert_tokens_to_ids(name) for name in ("<bos>", "<start_of_turn>", "<end_of_turn>")}
    assert {*special, *named.values()} == {*named.values()}
    assert [found.count(token) for token in named.values()] == [1, 4, 3]


@st.composite
def tool_conversations(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages of any length with parallel calls whose results come in any order, and the results in that order."""
    messages: list[dict[str, Any]] = [QUESTION]
    results: list[str] = []
    for turn in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            messages += [
                {"role": "assistant", "content": f"answer {turn}"},
                {"role": "user", "content": f"more {turn}"},
            ]
            continue
        names = [f"{turn}.{number}" for number in range(draw(st.integers(1, 3)))]
        messages.append(calls(*((name, "now", "{}") for name in names)))
        for name in draw(st.permutations(names)):
            results.append(f"result {name};")
            messages.append(result(name, results[-1]))
        if draw(st.booleans()):
            messages.append({"role": "user", "content": draw(st.sampled_from(["go on", "", " "]))})
    return messages, results


@given(tool_conversations(), st.sampled_from(["", FUNCTIONS]))
def test_turns_alternate_and_every_result_is_there_once_in_order(
    conversation: tuple[list[dict[str, Any]], list[str]], functions: str
) -> None:
    messages, results = conversation
    found = chat.from_messages(json.dumps(messages).encode(), [], functions).messages
    roles = [message["role"] for message in found]
    turns = roles[1:] if functions else roles
    assert turns == list(itertools.islice(itertools.cycle(["user", "assistant"]), len(turns)))
    assert len(turns) % 2 == 1
    shown = "".join(message["content"] for message in found)
    places = [shown.index(one) for one in results]
    assert places == sorted(places)
    assert all(shown.count(one) == 1 for one in results)


def nested(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


REFUSED: dict[str, tuple[list[Any], str]] = {
    "no result": ([QUESTION, ROME], "call '1' of weather has no result"),
    "no result before the next question": ([QUESTION, ROME, QUESTION], "call '1' of weather has no result"),
    "one result of two": ([QUESTION, TWO, result("1"), QUESTION], "call '2' of now has no result"),
    "a result twice": ([QUESTION, ROME, result("1"), result("1")], r"messages\[3\] answers the call '1'"),
    "a result of no call": ([QUESTION, result("1")], r"messages\[1\] answers the call '1'"),
    "a result of an older call": ([QUESTION, ROME, result("1"), TWO, result("3")], r"messages\[4\] answers"),
    "a result without id": ([QUESTION, ROME, {"role": "tool", "content": "rain"}], "needs the tool_call_id"),
    "a result without content": ([QUESTION, ROME, {"role": "tool", "tool_call_id": "1"}], "content must be"),
    "a result with an image": ([QUESTION, ROME, result("1", [{"type": "image"}])], "holds text only"),
    "calls of the user": ([{**ROME, "role": "user"}], "only an assistant message"),
    "no list": ([QUESTION, {**ROME, "tool_calls": {"id": "1"}}], "must be a list"),
    "no call": ([QUESTION, {**ROME, "tool_calls": [{}]}], r"tool_calls\[0\] must be"),
    "no object": ([QUESTION, {**ROME, "tool_calls": ["now"]}], r"tool_calls\[0\] must be"),
    "no id": ([QUESTION, {**ROME, "tool_calls": [{"function": {"name": "now"}}]}], r"tool_calls\[0\] must be"),
    "an id twice": ([QUESTION, calls(("1", "now", ""), ("1", "now", ""))], "two calls of the id '1'"),
    "a name with blanks": ([QUESTION, calls(("1", "what time", ""))], "letters, digits"),
    "arguments as an object": (
        [QUESTION, {**ROME, "tool_calls": [{"id": "1", "function": {"name": "now", "arguments": {}}}]}],
        "arguments.*JSON as text",
    ),
    "arguments that are no JSON": ([QUESTION, calls(("1", "now", "{"))], r"messages\[1\].*'now' are not JSON"),
    "arguments that are a list": ([QUESTION, calls(("1", "now", "[1]"))], "must be a JSON object"),
    "arguments of great depth": ([QUESTION, calls(("1", "now", nested(50_000)))], r"messages\[1\]: the arguments"),
    "two questions with a result between": ([QUESTION, ROME, result("1"), QUESTION, QUESTION], "alternate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_calls_and_results_that_do_not_fit_are_refused_with_the_place(case: str) -> None:
    messages, reason = REFUSED[case]
    with pytest.raises(errors.InvalidMessagesError, match=reason):
        ids(messages)


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        ("[", "", "tools is not valid JSON"),
        ("[]", "", "tools must be a list"),
        ("[" * 100_000, "", "tools is not valid JSON"),
        (TOOLS, "always", "tool_choice is not valid JSON"),
        (TOOLS, '"always"', "tool_choice must be"),
        (TOOLS, '{"type": "function", "function": {"name": "later"}}', "tool_choice names 'later'"),
        ("", "auto", "tool_choice needs tools"),
    ],
)
def test_tools_that_cannot_be_used_are_refused(tools: str, choice: str, reason: str) -> None:
    with pytest.raises(errors.InvalidParameterError, match=reason):
        ids([QUESTION], tools=tools, choice=choice)


def with_depth(depth: int) -> str:
    """Tools whose one schema has so many levels."""
    return json.dumps([NOW]).replace('"now"', f'"now", "parameters": {{"properties": {nested(depth - 1)}}}')


@pytest.mark.parametrize("depth", [65, 900, 990, 50_000])
def test_a_schema_of_great_depth_is_refused(depth: int) -> None:
    with pytest.raises(errors.InvalidParameterError, match=r"nested more than 64|not valid JSON"):
        ids([QUESTION], tools=with_depth(depth))
    assert len(ids([QUESTION], tools=with_depth(64))) > 64


def test_arguments_of_any_depth_are_used_or_refused() -> None:
    depths = [10, *range(900, 1000, 3), 100_000]  # the limit is the interpreter's own, and differs between versions
    used = []
    for depth in depths:
        with suppress(errors.InvalidMessagesError):
            ids([QUESTION, calls(("1", "now", nested(depth))), result("1")])
            used.append(depth)
    assert used == depths[: len(used)]
    assert 1 <= len(used) < len(depths)


def test_a_prompt_that_is_taken_as_it_is_cannot_be_given_functions() -> None:
    own = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    with pytest.raises(errors.InvalidRequestError, match="tools need messages"):
        ids([], text=own, tools=TOOLS)
    assert ids([], text=own, tools=TOOLS, choice="none") == ids([], text=own)


def test_functions_count_towards_the_context() -> None:
    length = len(ids([QUESTION], tools=TOOLS))
    narrow = PromptTokenizer(DEMO_CHECKPOINT, vocab_size=1024, max_context_length=length, images=None)
    with pytest.raises(errors.ContextLengthError, match=f"{length} tokens"):
        narrow([QUESTION["content"].encode()], [], [], [TOOLS.encode()])


def test_the_stage_loads_no_grammar_engine() -> None:
    code = "import sys, python_backends.prompt; print([name for name in sys.modules if 'guidance' in name])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"
