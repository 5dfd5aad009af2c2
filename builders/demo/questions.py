"""Whole conversations about drawings, each a function of its seed alone.

Training and held-out conversations come from different streams of seeds: `conversation` is given the stream's name, and
``random.Random`` is seeded with it, so no held-out conversation or picture is ever trained on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from builders.demo.asking import ASKERS, PRACTICE, Asked, Asker, View, describe
from builders.demo.chinese import CHINESE
from builders.demo.drawing import Scene, sample_scene
from builders.demo.english import ENGLISH
from builders.demo.following import IT_ASKERS, PAIR_ASKERS, repeat
from builders.demo.language import Language

TRAINING, VALIDATION, HELD_OUT = "train", "validation", "held-out"
PAIRS = 0.28  # share of conversations about two pictures
LANGUAGES = (ENGLISH, CHINESE)
LANGUAGE_OF = {language.name: language for language in LANGUAGES}
REPEATABLE = ("colour_of", "where", "count", "exist", "shape_at", "what_at", "colour_at")


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user says, how many of the conversation's next pictures come with it (before the words, or after them
    where ``pictures_last``), and the right answer.
    """

    user: str
    pictures: int
    answer: str
    category: str
    language: str
    pictures_last: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Pictures in the order shown, the turns, and a system prompt that changes no answer (or none)."""

    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]
    system: str | None


def _pick(rng: random.Random, askers: dict[Asker, float], view: View) -> tuple[Asker, Asked]:
    names, weights = list(askers), list(askers.values())
    while True:
        asker = rng.choices(names, weights)[0]
        asked = asker(view)
        if asked is not None:
            return asker, asked


def _casual(rng: random.Random, language: Language, text: str) -> str:
    """``text`` as people type it: sometimes a courtesy first, no capital, no final mark, American spelling."""
    if text and rng.random() < 0.1:
        courtesy = rng.choice(language.courtesies)
        text = courtesy + (text[0].lower() + text[1:] if courtesy.endswith((", ", ": ")) else text)
    if language.name == "en":
        if rng.random() < 0.4:
            text = text.replace("colour", "color")
        if rng.random() < 0.25:
            text = text.replace("picture", rng.choice(("image", "drawing")))
        if rng.random() < 0.3:
            text = text[:1].lower() + text[1:]
    elif rng.random() < 0.15:
        text = text.replace("？", "?")
    return text[:-1] if text and rng.random() < 0.2 and text[-1] in ".?!。？！" else text


class _Dialogue:
    """A conversation in the making: which pictures were shown and what the last question was about."""

    def __init__(self, rng: random.Random, scenes: tuple[Scene, ...], practice: bool) -> None:
        self.rng, self.scenes = rng, scenes
        self.askers, self.both = (PRACTICE, 0.55) if practice else (ASKERS, 0.4)
        self.language = rng.choice(LANGUAGES)
        self.shown = 0
        self.last: tuple[str, Scene, Asked] | None = None

    def small_talk(self) -> Turn:
        category = self.rng.choice(list(self.language.small_talk))
        phrasings, answer = self.language.small_talk[category]
        self.last = None
        return self._turn(Asked("talk", self.rng.choice(phrasings), answer), 0)

    def blind(self) -> Turn:
        """A question about a picture before any was shown."""
        view = View(self.rng, self.language, sample_scene(self.rng))
        asked = _pick(self.rng, self.askers, view)[1]
        return self._turn(Asked("talk", asked.question, self.language.answers["no_picture"]), 0)

    def show(self, count: int) -> Turn:
        """A question that brings ``count`` new pictures along."""
        self.shown += count
        self.last = None
        if count == 1 and self.shown == 1 and self.rng.random() < 0.03:
            asked = describe(View(self.rng, ENGLISH, self.scenes[0]))  # a picture without a word
            return Turn("", 1, asked.answer, asked.category, "en")
        return self._question(count)

    def go_on(self) -> Turn:
        """A question without new pictures; often one that leans on the last."""
        rng = self.rng
        if self.last is not None and rng.random() < 0.4:
            name, scene, before = self.last
            view = View(rng, self.language, scene, 0, self.scenes, before)
            if name in REPEATABLE and rng.random() < 0.5:
                for _ in range(6):
                    again = repeat(view, name)
                    if again is not None:
                        self.last = (name, scene, again)
                        return self._turn(again, 0)
            elif before.about is not None:
                asked = _pick(rng, IT_ASKERS, view)[1]
                self.last = None if asked.about is None else ("", scene, asked)
                return self._turn(asked, 0)
        return self._question(0)

    def _question(self, pictures: int) -> Turn:
        rng = self.rng
        if self.shown == 2 and rng.random() < self.both:
            asked = _pick(rng, PAIR_ASKERS, View(rng, self.language, self.scenes[0], 0, self.scenes))[1]
            self.last = None
            return self._turn(asked, pictures)
        which = rng.choice((1, 2)) if self.shown == 2 and (pictures != 1 or rng.random() < 0.3) else 0
        scene = self.scenes[which - 1] if which else self.scenes[self.shown - 1]
        asker, asked = _pick(rng, self.askers, View(rng, self.language, scene, which, self.scenes[: self.shown]))
        self.last = (asker.__name__, scene, asked)
        return self._turn(asked, pictures)

    def _turn(self, asked: Asked, pictures: int) -> Turn:
        said = _casual(self.rng, self.language, asked.question)
        last = pictures > 0 and self.rng.random() < 0.12
        return Turn(said, pictures, asked.answer, asked.category, self.language.name, last)


def _length(rng: random.Random) -> int:
    shortest, longest = rng.choices(((1, 1), (2, 4), (5, 8), (9, 12)), (20, 42, 30, 8))[0]
    return rng.randint(shortest, longest)


def conversation(
    stream: str, seed: int, index: int, turns_least: int = 1, pairs: float = PAIRS, practice: bool = False
) -> Conversation:
    """Conversation number ``index`` of ``stream`` (such as `TRAINING`) under ``seed``.

    It has at least ``turns_least`` turns and, with probability ``pairs``, two pictures; ``practice`` asks the harder
    questions more often. Evaluation keeps the defaults.
    """
    rng = random.Random(f"{stream}/{seed}/{index}")
    if rng.random() < 0.02:
        scenes: tuple[Scene, ...] = ()
    else:
        scenes = tuple(sample_scene(rng) for _ in range(2 if rng.random() < pairs else 1))
    dialogue = _Dialogue(rng, scenes, practice)
    turns: list[Turn] = []
    together = len(scenes) == 2 and rng.random() < 0.65
    for _ in range(max(_length(rng), turns_least, 1 if not scenes or together else len(scenes))):
        if turns and rng.random() < 0.06:
            dialogue.language = rng.choice(LANGUAGES)
            dialogue.last = None
        turns.append(_next_turn(rng, dialogue, together))
    system = rng.choice(dialogue.language.system_prompts) if rng.random() < 0.12 else None
    return Conversation(scenes[: dialogue.shown], tuple(turns), system)


def _next_turn(rng: random.Random, dialogue: _Dialogue, together: bool) -> Turn:
    waiting = len(dialogue.scenes) - dialogue.shown
    if rng.random() < 0.02:
        return dialogue.small_talk()
    if dialogue.shown == 0:
        if waiting == 0:
            return dialogue.blind() if rng.random() < 0.4 else dialogue.small_talk()
        return dialogue.blind() if rng.random() < 0.03 else dialogue.show(2 if together else 1)
    if waiting and rng.random() < 0.35:
        return dialogue.show(1)
    return dialogue.go_on()
