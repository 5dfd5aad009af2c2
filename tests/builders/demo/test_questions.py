"""Answers against a second reading of the scene, made from the question's words alone."""

import re

import pytest

from builders.demo.drawing import COLOURS, KINDS, Scene, Shape
from builders.demo.english import ENGLISH
from builders.demo.evaluate import sample_picture
from builders.demo.questions import HELD_OUT, TRAINING, Conversation, Turn, conversation
from builders.demo.samples import CATEGORIES
from builders.demo.scoring import is_right

TALKS = [conversation(HELD_OUT, 123, index) for index in range(1200)]
PLACES = dict(zip(ENGLISH.places, range(9), strict=True))
LONGEST_FIRST = sorted(PLACES, key=len, reverse=True)


def plain(text: str) -> str:
    return text.lower().replace("color", "colour").rstrip(".?!")


def named(words: str, scene: Scene) -> list[Shape]:
    """The shapes that nouns like "red circle", "circles", "blue shape" mean."""
    colour = next((name for name in COLOURS if re.search(rf"\b{name}\b", words)), None)
    kind = next((name for name in KINDS if re.search(rf"\b{name}s?\b", words)), None)
    return [s for s in scene.shapes if colour in (None, s.colour) and kind in (None, s.kind)]


def single_english() -> list[tuple[Scene, Turn]]:
    return [
        (talk.scenes[0], turn)
        for talk in TALKS
        if len(talk.scenes) == 1
        for turn in talk.turns
        if turn.language == "en" and turn.category not in ("follow", "talk", "two")
    ]


def matches(pattern: str) -> list[tuple[Scene, Turn, re.Match[str]]]:
    found = []
    for scene, turn in single_english():
        match = re.search(pattern, plain(turn.user))
        if match:
            found.append((scene, turn, match))
    assert len(found) >= 10
    return found


def test_counts() -> None:
    for scene, turn, match in matches(r"(?:how many|count the|number of) (.*?)(?: are| do| in| here|$)"):
        told = re.search(r"\d+", turn.answer)
        assert len(named(match[1], scene)) == (int(told[0]) if told else 0), turn


def test_sides() -> None:
    for scene, turn, match in matches(r"^(?:.*: |.*, |ok\. )?is the (.*?) (?:to the )?(left|right) of the (.*)"):
        (first,), (second,) = named(match[1], scene), named(match[3], scene)
        holds = first.x < second.x if match[2] == "left" else first.x > second.x
        assert turn.answer.startswith("Yes" if holds else "No"), turn


def test_heights() -> None:
    for scene, turn, match in matches(r"is the (.*?) (above|higher than|below|under) the (.*)"):
        (first,), (second,) = named(match[1], scene), named(match[3], scene)
        holds = first.y < second.y if match[2] in ("above", "higher than") else first.y > second.y
        assert turn.answer.startswith("Yes" if holds else "No"), turn


def test_sizes() -> None:
    for scene, turn, match in matches(r"is the (.*?) (larger|bigger|smaller) than the (.*)"):
        (first,), (second,) = named(match[1], scene), named(match[3], scene)
        holds = first.size < second.size if match[2] == "smaller" else first.size > second.size
        assert turn.answer.startswith("Yes" if holds else "No"), turn


def test_extremes() -> None:
    for scene, turn, match in matches(r"the (largest|biggest|smallest)"):
        pick = min if match[1] == "smallest" else max
        best = pick(scene.shapes, key=lambda shape: shape.size)
        assert f"{best.colour} {best.kind}" in turn.answer, turn


def test_places() -> None:
    for scene, turn, match in matches(r"(?:where is|where do you see|in which place is) the (.*)"):
        found = named(match[1], scene)
        if not found:
            assert "no " in turn.answer.lower(), turn
            continue
        place = next(name for name in LONGEST_FIRST if name in turn.answer)
        assert PLACES[place] == found[0].place, turn


def test_existence() -> None:
    for scene, turn, match in matches(r"(?:is there an? |do you see an? |can you see an? |are there any )(.*)"):
        assert turn.answer.startswith("Yes" if named(match[1], scene) else "No"), turn


@pytest.mark.parametrize("language", ["en", "zh"])
def test_descriptions_name_every_shape_with_its_place(language: str) -> None:
    asked = 0
    for talk in TALKS:
        for turn in talk.turns:
            if len(talk.scenes) == 1 and turn.category == "describe" and turn.language == language:
                asked += 1
                if language == "en":
                    for shape in talk.scenes[0].shapes:
                        assert f"{shape.colour} {shape.kind} {ENGLISH.places[shape.place]}" in turn.answer
                assert is_right(turn.answer, turn.answer, "describe", language)
                assert not is_right(turn.answer + " 5", turn.answer, "describe", language)
    assert asked > 20


def test_streams_never_share_a_picture() -> None:
    def pictures(stream: str) -> set[Scene]:
        return {scene for index in range(300) for scene in conversation(stream, 0, index).scenes}

    assert not pictures(TRAINING) & pictures(HELD_OUT)


def test_a_conversation_depends_on_its_number_alone() -> None:
    assert conversation(HELD_OUT, 7, 11) == conversation(HELD_OUT, 7, 11)
    assert conversation(HELD_OUT, 7, 11) != conversation(HELD_OUT, 8, 11)


def test_every_kind_of_question_comes_in_both_languages_over_one_and_two_pictures() -> None:
    seen = {(turn.category, turn.language) for talk in TALKS for turn in talk.turns}
    assert seen == {(category, language) for category in CATEGORIES for language in ("en", "zh")}
    assert {len(talk.scenes) for talk in TALKS} == {0, 1, 2}
    assert max(len(talk.turns) for talk in TALKS) >= 9
    assert all(isinstance(talk, Conversation) and talk.turns for talk in TALKS)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_sample_picture_speaks_the_language_asked_for(language: str) -> None:
    picture, question, expected = sample_picture(3, language=language)
    assert picture.mode == "RGB"
    assert bool(re.search("[\u4e00-\u9fff]", question + expected)) == (language == "zh")
    assert sample_picture(3, language=language)[1:] == (question, expected)
