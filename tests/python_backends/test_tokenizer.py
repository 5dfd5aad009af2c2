"""Token for token what transformers' own processor makes of the same conversation."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from python_backends import contract, errors
from python_backends.pixels import ImageLimits, PanAndScan
from python_backends.prompt import ImageTokens, PromptTokenizer, open_tokenizer
from python_backends.tokenizer import TritonPythonModel
from tests.fake_triton import Request, TritonError
from tests.paths import DEMO_CHECKPOINT
from tests.python_backends.stage_repository import CONTEXT, TOKENS_PER_IMAGE, VOCAB_SIZE, write_repository

BOS, BOI, EOI, SOFT = 2, 7, 8, 1023
LIMITS = ImageLimits(max_bytes=2**20, max_pixels=2**20)
# Small crops, so that small pictures have some.
CROPPING = PanAndScan(min_crop_size=16, max_num_crops=4, min_ratio_to_activate=1.2)


@functools.cache
def processor() -> Any:
    return AutoProcessor.from_pretrained(DEMO_CHECKPOINT)


@functools.cache
def prompt_tokenizer(*, cropping: bool = False, context: int = 10**6) -> PromptTokenizer:
    images = ImageTokens(TOKENS_PER_IMAGE, CROPPING if cropping else None, LIMITS, max_images=16)
    return PromptTokenizer(DEMO_CHECKPOINT, vocab_size=VOCAB_SIZE, max_context_length=context, images=images)


def text_only(context: int = 10**6) -> PromptTokenizer:
    return PromptTokenizer(DEMO_CHECKPOINT, vocab_size=SOFT, max_context_length=context, images=None)


@functools.cache
def png(width: int = 8, height: int = 8, shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def as_json(messages: Any) -> list[bytes]:
    return [json.dumps(messages).encode()]


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def reference(messages: list[dict[str, Any]], *, cropping: bool = False) -> Any:
    """What transformers makes of messages in the OpenAI form."""
    own = json.loads(json.dumps(messages))
    for message in own:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image_url":
                part.update(type="image", url=part.pop("image_url")["url"])
    options: dict[str, Any] = {"do_pan_and_scan": cropping}
    if cropping:
        options |= {f"pan_and_scan_{name}": value for name, value in vars(CROPPING).items()}
    return processor().apply_chat_template(
        own, tokenize=True, return_dict=True, add_generation_prompt=True, processor_kwargs=options
    )


def reference_ids(messages: list[dict[str, Any]], *, cropping: bool = False) -> list[int]:
    return list(np.ravel(reference(messages, cropping=cropping)["input_ids"]))


PIECES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["\n", "\n\n", "  ", " red circle", "▁", "\r\n", "<start_of_", "image>", "<0x41>", "<unused1>"]),
    st.sampled_from(["<end_of_turn>", "<start_of_turn>", "<bos>", "<eos>", "<pad>", "<unk>", "<mask>"]),
    st.sampled_from(["你好，世界", "🎉👩\u200d👩\u200d👧", "e\u0301", "\u202e", "\x00", "\ufeff"]),
)
TEXTS = st.lists(PIECES, max_size=5).map("".join).filter(lambda text: "_image>" not in text and "_token>" not in text)
TEXT_PARTS = TEXTS.map(lambda text: {"type": "text", "text": text})
PICTURES = st.builds(png, st.integers(1, 100), st.integers(1, 100), st.integers(0, 3))
IMAGE_PARTS = PICTURES.map(lambda data: {"type": "image_url", "image_url": {"url": data_url(data)}})


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    contents = st.one_of(TEXTS, st.lists(st.one_of(TEXT_PARTS, IMAGE_PARTS), min_size=1, max_size=4))
    turns = draw(st.lists(st.tuples(contents, TEXTS), max_size=2))
    messages = [{"role": "user", "content": "begin"}, {"role": "assistant", "content": "yes"}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": draw(contents)})
    # transformers itself fails on an empty system message
    system = draw(st.one_of(st.none(), TEXTS.filter(bool), st.lists(TEXT_PARTS, min_size=1, max_size=1)))
    return messages if system is None else [{"role": "system", "content": system}, *messages]


@settings(deadline=None, max_examples=150)
@given(conversations(), st.booleans())
def test_any_conversation_gives_the_processors_tokens(messages: list[dict[str, Any]], cropping: bool) -> None:
    found = prompt_tokenizer(cropping=cropping)([], as_json(messages), [])
    expected = reference(messages, cropping=cropping)
    assert found.input_ids.tolist() == list(np.ravel(expected["input_ids"]))
    assert len(found.image_starts) == len(expected.get("pixel_values", []))
    for start in found.image_starts:
        span = found.input_ids[start - 1 : start + TOKENS_PER_IMAGE + 1].tolist()
        assert span == [BOI, *[SOFT] * TOKENS_PER_IMAGE, EOI]


@settings(deadline=None, max_examples=60)
@given(TEXTS.filter(lambda text: text.strip() and "<start_of_turn>" not in text), st.lists(PICTURES, max_size=3))
def test_a_text_is_one_user_turn_with_its_images_in_front(text: str, images: list[bytes]) -> None:
    parts = [{"type": "image_url", "image_url": {"url": data_url(data)}} for data in images]
    found = prompt_tokenizer()([text.encode()], [], images)
    assert found.input_ids.tolist() == reference_ids(user(*parts, {"type": "text", "text": text}))
    assert found.image_bytes == images


@pytest.mark.parametrize("start", ["", "<bos>"])
def test_a_templated_prompt_is_taken_as_it_is_with_one_bos(start: str) -> None:
    prompt = "<start_of_turn>user\nHi <end_of_turn>\n<start_of_turn>model\nWell, "
    found = prompt_tokenizer()([(start + prompt).encode()], [], [])
    assert found.input_ids.tolist() == processor().tokenizer(prompt)["input_ids"]
    assert found.input_ids.tolist().count(BOS) == 1


def test_a_templated_prompt_takes_images_at_its_placeholders() -> None:
    prompt = "<start_of_turn>user\nA <start_of_image> b<end_of_turn>\n<start_of_turn>model\n"
    found = prompt_tokenizer()([prompt.encode()], [], [png()])
    expected = processor()(text=prompt, images=[Image.open(io.BytesIO(png()))])["input_ids"]
    assert found.input_ids.tolist() == list(np.ravel(expected))


def test_a_templated_prompt_without_placeholders_has_its_images_in_the_last_user_turn() -> None:
    turn = "<start_of_turn>user\n{}b<end_of_turn>\n<start_of_turn>model\n"
    history = "<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nc<end_of_turn>\n"
    found = prompt_tokenizer()([(history + turn.format("")).encode()], [], [png(), png()])
    marked = prompt_tokenizer()([(history + turn.format("<start_of_image>" * 2)).encode()], [], [png(), png()])
    assert found.input_ids.tolist() == marked.input_ids.tolist()


def test_images_fill_the_placeholders_in_prompt_order() -> None:
    first, second, third, fourth = (png(shade=shade) for shade in range(4))
    messages = [
        {"role": "user", "content": "look <start_of_image>"},
        {"role": "assistant", "content": "I do"},
        *user(
            {"type": "image_url", "image_url": data_url(second)},
            {"type": "image"},
            {"type": "text", "text": "and"},
            {"type": "image", "base64": base64.b64encode(fourth).decode()},
        ),
    ]
    assert prompt_tokenizer()([], as_json(messages), [first, third]).image_bytes == [first, second, third, fourth]


def test_images_without_placeholders_go_before_the_last_question() -> None:
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    inline = {"type": "image_url", "image_url": {"url": data_url(png(shade=1))}}
    beside = {"type": "image_url", "image_url": {"url": data_url(png(shade=2))}}
    found = prompt_tokenizer()([], as_json([*history, *user({"type": "text", "text": "c"}, inline)]), [png(shade=2)])
    expected = [*history, *user(beside, {"type": "text", "text": "c"}, inline)]
    assert found.input_ids.tolist() == reference_ids(expected)
    assert found.image_bytes == [png(shade=2), png(shade=1)]


@pytest.mark.parametrize(
    "form",
    [
        lambda data: data,
        base64.b64encode,
        base64.encodebytes,
        lambda data: base64.urlsafe_b64encode(data).rstrip(b"="),
        lambda data: data_url(data).encode(),
        lambda data: b"data:;charset=utf-8;BASE64," + base64.b64encode(data),
    ],
    ids=["bytes", "base64", "lines", "url-safe", "data-url", "bare-data-url"],
)
def test_an_image_may_come_in_any_form(form: Callable[[bytes], bytes]) -> None:
    assert prompt_tokenizer()([b"What?"], [], [form(png(30, 7))]).image_bytes == [png(30, 7)]


def test_other_names_of_roles_mean_the_same() -> None:
    plain = [("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    other = [("developer", "be brief"), ("user", "a"), ("model", "b"), ("user", "c")]
    first, second = (
        prompt_tokenizer()([], as_json([{"role": role, "content": text} for role, text in turns]), [])
        for turns in (plain, other)
    )
    assert first.input_ids.tolist() == second.input_ids.tolist()


def test_no_part_of_a_system_message_is_lost() -> None:
    parts = [{"type": "text", "text": text} for text in ("be brief", "be kind")]
    found = prompt_tokenizer()([], as_json([{"role": "system", "content": parts}, *user(parts[0])]), [])
    assert found.input_ids.tolist() == reference_ids(
        [{"role": "system", "content": "be brief\nbe kind"}, *user(parts[0])]
    )


HELLO = {"role": "user", "content": "hello"}
REPLY = {"role": "assistant", "content": "hello"}
REFUSED: dict[str, tuple[dict[str, Sequence[bytes]], type[errors.WiCoreError]]] = {
    "nothing": ({}, errors.EmptyPromptError),
    "blank text": ({"text": [b" \n\t"]}, errors.EmptyPromptError),
    "blank message": ({"messages": as_json([{"role": "user", "content": " "}])}, errors.EmptyPromptError),
    "blank parts": ({"messages": as_json(user({"type": "text", "text": ""}))}, errors.EmptyPromptError),
    "text and messages": ({"text": [b"a"], "messages": as_json([HELLO])}, errors.InvalidRequestError),
    "invalid UTF-8": ({"text": [b"caf\xe9"]}, errors.InvalidTextError),
    "invalid UTF-8 in messages": ({"messages": [b'[{"role":"user","content":"\xff"}]']}, errors.InvalidTextError),
    "lone surrogate": ({"messages": [b'[{"role":"user","content":"\\ud800"}]']}, errors.InvalidTextError),
    "soft token": ({"text": [b"a <image_soft_token>"]}, errors.InvalidTextError),
    "not JSON": ({"messages": [b'[{"role": "user"']}, errors.InvalidMessagesError),
    "endless nesting": ({"messages": [b"[" * 200_000]}, errors.InvalidMessagesError),
    "an object": ({"messages": as_json(HELLO)}, errors.InvalidMessagesError),
    "no message": ({"messages": as_json([])}, errors.InvalidMessagesError),
    "a bare text": ({"messages": as_json(["hello"])}, errors.InvalidMessagesError),
    "no role": ({"messages": as_json([{"content": "a"}])}, errors.InvalidMessagesError),
    "unknown role": ({"messages": as_json([{"role": "robot", "content": "a"}])}, errors.InvalidMessagesError),
    "role that cannot be hashed": ({"messages": as_json([{"role": [], "content": "a"}])}, errors.InvalidMessagesError),
    "no content": ({"messages": as_json([{"role": "user"}])}, errors.InvalidMessagesError),
    "number as content": ({"messages": as_json([{"role": "user", "content": 1}])}, errors.InvalidMessagesError),
    "bare text as part": ({"messages": as_json(user("a"))}, errors.InvalidMessagesError),
    "unknown part": ({"messages": as_json(user({"type": "video"}))}, errors.InvalidMessagesError),
    "text part without text": ({"messages": as_json(user({"type": "text"}))}, errors.InvalidMessagesError),
    "image part without image": ({"messages": as_json(user({"type": "image_url"}))}, errors.InvalidMessagesError),
    "image part that is a list": (
        {"messages": as_json(user({"type": "image", "url": []}))},
        errors.InvalidMessagesError,
    ),
    "image in the system message": (
        {"messages": as_json([{"role": "system", "content": [{"type": "image"}]}, HELLO]), "images": [png()]},
        errors.InvalidMessagesError,
    ),
    "system message alone": ({"messages": as_json([{"role": "system", "content": "a"}])}, errors.InvalidMessagesError),
    "answer first": ({"messages": as_json([REPLY, HELLO])}, errors.InvalidMessagesError),
    "two questions": ({"messages": as_json([HELLO, HELLO])}, errors.InvalidMessagesError),
    "too few images": ({"text": [b"<start_of_image> <start_of_image>"], "images": [png()]}, errors.ImageCountError),
    "too many images": ({"text": [b"<start_of_image>"], "images": [png(), png()]}, errors.ImageCountError),
    "placeholder alone": ({"messages": as_json(user({"type": "image"}))}, errors.ImageCountError),
    "more images than the limit": ({"text": [b"a"], "images": [png()] * 17}, errors.ImageCountError),
    "turns without a user": ({"text": [b"<start_of_turn>model\n"], "images": [png()]}, errors.ImageCountError),
    "empty image": ({"text": [b"a"], "images": [b""]}, errors.InvalidImageError),
    "address": ({"text": [b"a"], "images": [b"https://example.org/cat.png"]}, errors.InvalidImageError),
    "data URL without base64": ({"text": [b"a"], "images": [b"data:image/png,abc"]}, errors.InvalidImageError),
    "not base64": ({"text": [b"a"], "images": [b"a picture of a cat"]}, errors.InvalidImageError),
    "base64 of a text": ({"text": [b"a"], "images": [base64.b64encode(b"a cat")]}, errors.InvalidImageError),
    "too many bytes": ({"text": [b"a"], "images": [png() + bytes(2**20)]}, errors.ImageTooLargeError),
    "too many bytes of base64": ({"text": [b"a"], "images": [b"A" * 2**21]}, errors.ImageTooLargeError),
    "too many pixels": ({"text": [b"a"], "images": [png(1025, 1024)]}, errors.ImageTooLargeError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_its_own_error(case: str) -> None:
    inputs, kind = REFUSED[case]
    with pytest.raises(errors.WiCoreError) as caught:
        prompt_tokenizer()(inputs.get("text", []), inputs.get("messages", []), inputs.get("images", []))
    assert type(caught.value) is kind
    assert len(caught.value.message) < 300


def test_an_address_is_refused_with_the_reason() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "http://example.org/cat.png"}}]
    with pytest.raises(errors.InvalidImageError, match="fetches nothing"):
        prompt_tokenizer()([], as_json(user(*parts)), [])


@pytest.mark.parametrize("inputs", [([b"a"], [], [png()]), ([b"<start_of_image>"], [], []), ([], [], [b"x"])])
def test_a_text_only_model_refuses_images(inputs: tuple[list[bytes], list[bytes], list[bytes]]) -> None:
    with pytest.raises(errors.ImagesNotSupportedError):
        text_only()(*inputs)


def test_a_text_only_model_gives_the_same_tokens_for_text() -> None:
    found = text_only()([b"What is left?"], [], [])
    assert found.input_ids.tolist() == prompt_tokenizer()([b"What is left?"], [], []).input_ids.tolist()
    assert found.image_starts.size == len(found.image_bytes) == 0


def test_a_token_without_embedding_is_refused() -> None:
    narrow = PromptTokenizer(DEMO_CHECKPOINT, vocab_size=100, max_context_length=1000, images=None)
    with pytest.raises(errors.InvalidTextError, match="no embedding"):
        narrow([b"What is left?"], [], [])


def test_a_prompt_must_leave_room_for_one_token() -> None:
    length = len(prompt_tokenizer()([b"What is left?"], [], []).input_ids)
    assert len(text_only(context=length + 1)([b"What is left?"], [], []).input_ids) == length
    with pytest.raises(errors.ContextLengthError, match=f"{length} tokens.*{length} tokens"):
        text_only(context=length)([b"What is left?"], [], [])


def test_a_hopelessly_long_prompt_is_refused_without_tokenizing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    short = text_only(context=1000)
    monkeypatch.setattr(short, "_tokenizer", None)
    with pytest.raises(errors.ContextLengthError, match="at least"):
        short([b"word " * 1_000_000], [], [])


def test_a_model_without_template_takes_plain_prompts_alone(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_CHECKPOINT / name, tmp_path / name)
    base = PromptTokenizer(tmp_path, vocab_size=VOCAB_SIZE, max_context_length=100, images=None)
    assert base([b" once upon"], [], []).input_ids.tolist() == processor().tokenizer(" once upon")["input_ids"]
    with pytest.raises(errors.InvalidMessagesError, match="text_input"):
        base([], as_json([HELLO]), [])


def test_files_that_are_no_tokenizer_are_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(errors.ArtifactError, match="wicore build"):
        PromptTokenizer(tmp_path, vocab_size=1, max_context_length=1, images=None)


def answers(model: TritonPythonModel, *inputs: Mapping[str, Sequence[bytes]]) -> list[Any]:
    requests = [Request(contract.MODELS[contract.TOKENIZER], values) for values in inputs]
    model.execute(requests)
    return [request.response() for request in requests]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    repository = write_repository(tmp_path)
    stage = TritonPythonModel()
    stage.initialize({"model_repository": str(repository / "tokenizer")})
    yield stage
    stage.finalize()


def test_the_model_answers_each_request_of_a_batch_by_itself(model: TritonPythonModel) -> None:
    text, bad, image, tools, choice = answers(
        model,
        {"text_input": [b"Hello"]},
        {"text_input": [b"\xff"]},
        {"text_input": [b"Hello"], "image": [png()]},
        {"text_input": [b"Hello"], "tools": [b'[{"type": "function", "function": {"name": "f"}}]']},
        {"text_input": [b"Hello"], "tool_choice": [b'"auto"']},
    )
    assert text.error is None
    assert text.tensors["input_ids"].dtype == text.tensors["image_starts"].dtype == np.int32
    assert text.tensors["image_bytes"].shape == text.tensors["image_starts"].shape == (1, 0)
    assert (bad.error.code, bad.error.message.partition(":")[0]) == (TritonError.INVALID_ARG, "invalid_text")
    assert image.tensors["image_bytes"].tolist() == [[png()]]
    assert image.tensors["input_ids"][0, image.tensors["image_starts"][0, 0]] == SOFT
    assert tools.error is None
    assert tools.tensors["input_ids"].size > text.tensors["input_ids"].size
    assert (choice.error.code, choice.error.message.partition(":")[0]) == (TritonError.INVALID_ARG, "invalid_parameter")


@pytest.mark.effect("max_images", "max_image_bytes", "max_image_pixels", "max_context_length", "pan_and_scan")
def test_the_configuration_sets_the_limits(tmp_path: Path) -> None:
    values = {"max_images": 1, "max_image_bytes": 10**4, "max_image_pixels": 10**4, "max_context_length": 200}
    found = open_tokenizer(write_repository(tmp_path, settings={**values, "pan_and_scan": True}))
    for images, kind in [
        ([png(), png()], errors.ImageCountError),
        ([png(101, 100)], errors.ImageTooLargeError),
        ([png() + bytes(10**4)], errors.ImageTooLargeError),
    ]:
        with pytest.raises(kind):
            found([b"a"], [], images)
    with pytest.raises(errors.ContextLengthError, match="200 tokens of context"):
        found([b"a " * 200], [], [])


def test_pan_and_scan_counts_crops_with_the_processors_own_numbers(tmp_path: Path) -> None:
    found = open_tokenizer(write_repository(tmp_path, settings={"pan_and_scan": True}))
    assert len(found([b"a"], [], [png(256, 512), png(100, 300)]).image_starts) == 1 + 2 + 1


def test_the_models_own_context_is_the_limit_where_it_is_shorter(tmp_path: Path) -> None:
    found = open_tokenizer(write_repository(tmp_path, settings={"max_context_length": 10 * CONTEXT}))
    with pytest.raises(errors.ContextLengthError, match=f"{CONTEXT:,} tokens of context"):
        found([b"a 1 " * CONTEXT], [], [])


def test_requests_are_tokenized_alike_from_many_threads(model: TritonPythonModel) -> None:
    texts = [f"word {number} ".encode() * 50 for number in range(16)]
    found = answers(model, *({"text_input": [text]} for text in itertools.chain(texts, texts)))
    ids = [response.tensors["input_ids"].tolist() for response in found]
    assert ids[:16] == ids[16:]
    assert ids[3][0] == text_only()([texts[3]], [], []).input_ids.tolist()
