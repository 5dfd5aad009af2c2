"""The demo checkpoint's tokenizer and the training rows made with it."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoProcessor

from builders.demo import evaluate
from builders.demo.cells import IGNORED
from builders.demo.drawing import render
from builders.demo.model import IMAGE_SOFT_TOKEN
from builders.demo.questions import HELD_OUT, conversation
from builders.demo.samples import encode

CHECKPOINT = Path(evaluate.__file__).parent / "checkpoint"


@pytest.fixture(scope="module")
def processor() -> AutoProcessor:
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(deadline=None, max_examples=150)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    # Text that spells a special token becomes that token; "▁" is how the tokenizer itself writes a space.
    assert tokenizer.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")


@pytest.mark.parametrize(
    "text", ["", "  two  spaces ", "a\n\nb\n\n\n\n\nc", "🦀é\u0000中文字", "Ünïcödé — “quotes”", "\t\r\n"]
)
def test_awkward_texts_survive_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_training_rows_are_what_the_processor_makes_of_the_same_conversation(
    processor: AutoProcessor, tokenizer: Tokenizer
) -> None:
    pictures = 0
    for index in range(12):
        talk = conversation(HELD_OUT, 42, index)
        answers = [turn.answer for turn in talk.turns]
        images = [render(scene) for scene in talk.scenes]
        messages, shown = evaluate.request(talk, len(talk.turns) - 1, answers, images)
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        wanted = processor(text=text, images=shown or None, add_special_tokens=False, return_tensors="np")
        encoded = encode(tokenizer, talk, 10**6)
        prompt = wanted["input_ids"][0].tolist()
        assert encoded.ids[: len(prompt)].tolist() == prompt
        for mine, theirs in zip(encoded.pixels, wanted.get("pixel_values", ()), strict=True):
            assert abs(mine.transpose(2, 0, 1) / 127.5 - 1 - theirs).max() < 1e-5
            pictures += 1
    assert pictures >= 10


def test_the_loss_is_taken_on_the_answers_alone(tokenizer: Tokenizer) -> None:
    talk = conversation(HELD_OUT, 42, 3)
    encoded = encode(tokenizer, talk, 10**6)
    chosen = encoded.labels[encoded.labels != IGNORED]
    assert tokenizer.decode(chosen.tolist(), skip_special_tokens=False) == "".join(
        f"{turn.answer}<end_of_turn>" for turn in talk.turns
    )
    assert IMAGE_SOFT_TOKEN not in chosen


def test_rows_too_long_lose_their_last_turns(tokenizer: Tokenizer) -> None:
    talk = conversation(HELD_OUT, 42, 3, turns_least=12)
    whole, cut = encode(tokenizer, talk, 10**6), encode(tokenizer, talk, 200)
    assert len(cut.ids) <= 200 < len(whole.ids)
    assert whole.ids[: len(cut.ids)].tolist() == cut.ids.tolist()
