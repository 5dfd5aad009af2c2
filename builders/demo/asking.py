"""One question about one drawing (or two): how each kind of question is drawn, worded and answered.

An asker looks at a `View` (the picture asked about, the language, what the last turn was about) and returns an `Asked`,
or ``None`` where the drawing gives no clear case of that question.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from builders.demo.drawing import COLOURS, KINDS, Scene, Shape
from builders.demo.language import Language

RELATION_MARGIN = 0.15  # least difference of two centres before left/right/above/below is asked
SIZE_RATIO = 1.4  # least ratio of two sizes before they are compared
RADIUS_RATIO = 1.15  # and of their circumradii, so that no star looks larger than it is


@dataclass(frozen=True, slots=True)
class Spec:
    """What a noun says: "red circle", "circle", "red shape", "shape"."""

    colour: str | None = None
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A worded question and its only right answer. ``about``: the one shape spoken of, which "it" then means."""

    category: str
    question: str
    answer: str
    about: Shape | None = None


@dataclass(frozen=True, slots=True)
class View:
    """What an asker may look at: ``scene`` is the picture asked about, ``which`` its number or 0 for the last one."""

    rng: random.Random
    language: Language
    scene: Scene
    which: int = 0
    others: tuple[Scene, ...] = ()
    before: Asked | None = None

    def word(self, spec: Spec, plural: bool = False, asking: bool = False) -> str:
        """The noun for ``spec``; a question may use any word for it, an answer always the same one."""
        kinds = self.language.kinds.get(spec.kind or "", ())
        kind = (self.rng.choice(kinds) if asking and self.rng.random() < 0.4 else kinds[0]) if kinds else None
        return self.language.noun(self.language.colours.get(spec.colour or ""), kind, plural)

    def a(self, spec: Spec, asking: bool = False) -> str:
        """The noun for ``spec`` with its article."""
        return self.language.with_article(self.word(spec, asking=asking))

    def at(self, shape: Shape) -> str:
        """The place of ``shape``."""
        return self.language.places[shape.place]

    def colour(self, shape: Shape) -> str:
        """The colour of ``shape``."""
        return self.language.colours[shape.colour]

    def counted(self, count: int, spec: Spec) -> str:
        """Such as "2 red circles"."""
        return self.language.counted(count, self.word(spec), self.word(spec, plural=True))

    def ask(self, key: str, **slots: str) -> str:
        """A phrasing of question ``key``, naming the picture where ``which`` says so."""
        plain = self.which == 0 and self.rng.random() < 0.6
        picture = "" if plain else self.rng.choice(self.language.pictures[self.which])
        return self.rng.choice(self.language.questions[key]).format(pic=picture, **slots)

    def say(self, key: str, **slots: str | int) -> str:
        """Answer ``key``."""
        return self.language.answers[key].format(**slots)

    def listing(self, shapes: list[Shape]) -> str:
        """``shapes`` with their places, in their order."""
        return self.language.listing([(self.word(full(shape)), self.at(shape)) for shape in shapes])


Asker = Callable[[View], Asked | None]


def full(shape: Shape) -> Spec:
    """Colour and kind of ``shape``."""
    return Spec(shape.colour, shape.kind)


def matching(scene: Scene, spec: Spec) -> list[Shape]:
    """The shapes of ``scene`` that ``spec`` names."""
    return scene.find(colour=spec.colour, kind=spec.kind)


def _named(view: View, shape: Shape, allowed: str = "full kind colour") -> Spec | None:
    """A noun that names ``shape`` alone in its picture."""
    choices = {"full": full(shape), "kind": Spec(kind=shape.kind), "colour": Spec(colour=shape.colour)}
    specs = [choices[name] for name in allowed.split() if len(matching(view.scene, choices[name])) == 1]
    return view.rng.choice(specs) if specs else None


def _random_spec(view: View) -> Spec:
    """Any noun; half of the time one that something in the picture answers to."""
    rng = view.rng
    near = rng.choice(view.scene.shapes)
    colour = near.colour if rng.random() < 0.65 else rng.choice(COLOURS)
    kind = near.kind if rng.random() < 0.65 else rng.choice(KINDS)
    return rng.choice((Spec(colour), Spec(None, kind), Spec(colour, kind), Spec(colour, kind)))


def describe(view: View) -> Asked:
    """List every shape."""
    shapes = list(view.scene.shapes)
    key = "describe_one" if len(shapes) == 1 else "describe"
    answer = view.say(key, n=len(shapes), list=view.listing(shapes))
    about = shapes[0] if len(shapes) == 1 else None
    return Asked("describe", view.ask("describe_nth" if view.which else "describe"), answer, about)


def count_answer(view: View, spec: Spec) -> str:
    """The answer to how many ``spec`` names."""
    count = len(matching(view.scene, spec))
    if count == 0:
        return view.say("count_none", many=view.word(spec, plural=True))
    return view.say("count_one" if count == 1 else "count", counted=view.counted(count, spec))


def count(view: View) -> Asked | None:
    """How many of something there are."""
    spec = Spec() if view.rng.random() < 0.35 else _random_spec(view)
    found = matching(view.scene, spec)
    key = "count_total" if spec == Spec() and view.rng.random() < 0.4 else "count"
    question = view.ask(key, many=view.word(spec, plural=True, asking=True))
    return Asked("count", question, count_answer(view, spec), found[0] if len(found) == 1 else None)


def _absent(view: View, spec: Spec) -> str:
    return view.say("absent", the=view.word(spec))


def colour_of(view: View) -> Asked | None:
    """The colour of a kind of shape."""
    spec = Spec(kind=view.rng.choice(KINDS))
    found = matching(view.scene, spec)
    if len(found) > 1 or (not found and view.rng.random() < 0.7):
        return None
    question = view.ask("colour_of", the=view.word(spec, asking=True))
    if not found:
        return Asked("colour", question, _absent(view, spec))
    return Asked("colour", question, view.say("colour_of", the=view.word(spec), c=view.colour(found[0])), found[0])


def _at_place(view: View, key: str, answer: Callable[[Shape], str]) -> Asked | None:
    place = view.rng.choice(view.scene.shapes).place if view.rng.random() < 0.9 else view.rng.randrange(9)
    found = view.scene.find(place=place)
    if len(found) > 1:
        return None
    at = view.language.places[place]
    category = "colour" if key == "colour_at" else "shape"
    if not found:
        return Asked(category, view.ask(key, at=at), view.say("empty", at=at))
    return Asked(category, view.ask(key, at=at), answer(found[0]), found[0])


def colour_at(view: View) -> Asked | None:
    """The colour of what is at a place."""
    return _at_place(view, "colour_at", lambda shape: view.say("it_is_colour", c=view.colour(shape)))


def _is_shape(view: View, shape: Shape) -> str:
    spec = Spec(kind=shape.kind)
    return view.say("it_is_shape", a=view.a(spec), the=view.word(spec))


def shape_at(view: View) -> Asked | None:
    """The kind of what is at a place."""
    return _at_place(view, "shape_at", lambda shape: _is_shape(view, shape))


def _a_thing(view: View, shape: Shape) -> str:
    thing = view.a(full(shape))
    return view.say("a_thing", A=thing[0].upper() + thing[1:])


def what_at(view: View) -> Asked | None:
    """Colour and kind of what is at a place."""
    return _at_place(view, "what_at", lambda shape: _a_thing(view, shape))


def shape_of(view: View) -> Asked | None:
    """The kind of the one shape of a colour."""
    shape = view.rng.choice(view.scene.shapes)
    if len(view.scene.find(colour=shape.colour)) > 1:
        return None
    spec = Spec(kind=shape.kind)
    colour = view.colour(shape)
    answer = view.say("shape_of", c=colour, a=view.a(spec), the=view.word(spec))
    return Asked("shape", view.ask("shape_of", c=colour), answer, shape)


def where(view: View) -> Asked | None:
    """The place of a shape."""
    if view.rng.random() < 0.06:
        spec = _random_spec(view)
        if matching(view.scene, spec):
            return None
        return Asked("where", view.ask("where", the=view.word(spec, asking=True)), _absent(view, spec))
    shape = view.rng.choice(view.scene.shapes)
    named = _named(view, shape)
    if named is None:
        return None
    answer = view.say("where", the=view.word(named), at=view.at(shape))
    return Asked("where", view.ask("where", the=view.word(named, asking=True)), answer, shape)


def clearly_larger(first: Shape, second: Shape) -> bool:
    """Whether ``first`` is larger than ``second`` beyond doubt, by area and by reach."""
    return first.size >= second.size * SIZE_RATIO and first.radius >= second.radius * RADIUS_RATIO


def extreme(view: View) -> Asked | None:
    """The largest or smallest shape."""
    key = view.rng.choice(("largest", "smallest"))
    ordered = sorted(view.scene.shapes, key=lambda shape: shape.size, reverse=key == "largest")
    best = ordered[0]
    for other in ordered[1:]:
        if not (clearly_larger(best, other) if key == "largest" else clearly_larger(other, best)):
            return None
    if len(ordered) < 2:
        return None
    return Asked("size", view.ask(key), view.say(key, the=view.word(full(best))), best)


def _pair(view: View) -> tuple[Shape, Shape, Spec, Spec] | None:
    """Two shapes and a noun for each that names it alone."""
    if len(view.scene.shapes) < 2:
        return None
    first, second = view.rng.sample(view.scene.shapes, 2)
    one, two = _named(view, first), _named(view, second)
    return (first, second, one, two) if one and two else None


def which_larger(view: View) -> Asked | None:
    """Which of two shapes is larger or smaller."""
    pair = _pair(view)
    if pair is None:
        return None
    first, second, one, two = pair
    larger = clearly_larger(first, second)
    if not larger and not clearly_larger(second, first):
        return None
    key = view.rng.choice(("which_larger", "which_smaller"))
    wins = larger == (key == "which_larger")
    question = view.ask(key, the=view.word(one, asking=True), other=view.word(two, asking=True))
    return Asked("size", question, view.say(key, the=view.word(one if wins else two)), first if wins else second)


def relation(view: View) -> Asked | None:
    """Whether one shape is left of, above … or larger than another."""
    pair = _pair(view)
    if pair is None:
        return None
    first, second, one, two = pair
    key = view.rng.choice(("left", "right", "above", "below", "larger", "smaller"))
    if key in ("larger", "smaller"):
        holds = clearly_larger(first, second)
        clear = holds or clearly_larger(second, first)
        category = "size"
    else:
        difference = second.x - first.x if key in ("left", "right") else second.y - first.y
        clear, holds = abs(difference) >= RELATION_MARGIN, difference > 0
        category = "relation"
    if not clear:
        return None
    truth = holds == (key in ("left", "above", "larger"))
    question = view.ask(f"is_{key}", the=view.word(one, asking=True), other=view.word(two, asking=True))
    return Asked(category, question, view.say(f"{'yes' if truth else 'no'}_{key}"), first)


def exist_answer(view: View, spec: Spec) -> str:
    """The answer to whether there is any that ``spec`` names."""
    found = len(matching(view.scene, spec))
    if found == 0:
        return view.say("exist_none", the=view.word(spec))
    counted = view.counted(found, spec)
    return view.say("exist_one" if found == 1 else "exist", a=view.a(spec), counted=counted)


def exist(view: View) -> Asked | None:
    """Whether there is something of that name."""
    spec = _random_spec(view)
    found = matching(view.scene, spec)
    slots = {"a": view.a(spec, asking=True), "the": view.word(spec, asking=True)}
    question = view.ask("exist", many=view.word(spec, plural=True, asking=True), **slots)
    return Asked("exist", question, exist_answer(view, spec), found[0] if len(found) == 1 else None)


def is_at(view: View) -> Asked | None:
    """Whether a shape is at a place."""
    shape = view.rng.choice(view.scene.shapes)
    named = _named(view, shape)
    if named is None:
        return None
    place = shape.place if view.rng.random() < 0.5 else view.rng.randrange(9)
    question = view.ask("is_at", the=view.word(named, asking=True), at=view.language.places[place])
    return Asked("where", question, view.say("yes_at" if place == shape.place else "no_at", at=view.at(shape)), shape)


def is_colour(view: View) -> Asked | None:
    """Whether a shape has a colour."""
    shape = view.rng.choice(view.scene.shapes)
    named = _named(view, shape, "kind")
    if named is None:
        return None
    guess = shape.colour if view.rng.random() < 0.5 else view.rng.choice(COLOURS)
    question = view.ask("is_colour", the=view.word(named, asking=True), c=view.language.colours[guess])
    key = "yes_colour" if guess == shape.colour else "no_colour"
    return Asked("colour", question, view.say(key, c=view.colour(shape)), shape)


def same_colour(view: View) -> Asked | None:
    """Whether two shapes have one colour."""
    if len(view.scene.shapes) < 2:
        return None
    first, second = view.rng.sample(view.scene.shapes, 2)
    one, two = _named(view, first, "kind"), _named(view, second, "kind")
    if one is None or two is None:
        return None
    question = view.ask("same_colour", the=view.word(one, asking=True), other=view.word(two, asking=True))
    if first.colour == second.colour:
        return Asked("compare", question, view.say("same_colour", c=view.colour(first)))
    words = {"the": view.word(one), "other": view.word(two), "c": view.colour(first), "d": view.colour(second)}
    return Asked("compare", question, view.say("other_colour", **words))


def more(view: View) -> Asked | None:
    """Whether there are more of one than of another."""
    if view.rng.random() < 0.5:
        first, second = (Spec(kind=kind) for kind in view.rng.sample(KINDS, 2))
    else:
        first, second = (Spec(colour=colour) for colour in view.rng.sample(COLOURS, 2))
    n, m = len(matching(view.scene, first)), len(matching(view.scene, second))
    if n + m == 0:
        return None
    plurals = {"many": view.word(first, True, asking=True), "others": view.word(second, True, asking=True)}
    key = "more_yes" if n > m else "more_no"
    counts = {"counted": view.counted(n, first), "counted2": view.counted(m, second)}
    return Asked("compare", view.ask("more", **plurals), view.say(key, many=view.word(first, True), **counts))


ASKERS: dict[Asker, float] = {
    describe: 12, count: 12, colour_of: 9, colour_at: 4, shape_at: 4, what_at: 4, shape_of: 5, where: 12, extreme: 16,
    which_larger: 16, relation: 28, exist: 9, is_at: 4, is_colour: 4, same_colour: 9, more: 5,
}  # fmt: skip
# What training asks instead: the questions that take longest to learn, more often.
PRACTICE: dict[Asker, float] = {
    describe: 9, count: 12, colour_of: 4, colour_at: 2, shape_at: 2, what_at: 3, shape_of: 2, where: 8, extreme: 16,
    which_larger: 24, relation: 90, exist: 14, is_at: 6, is_colour: 3, same_colour: 30, more: 22,
}  # fmt: skip
