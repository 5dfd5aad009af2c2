"""Questions that lean on what was said before, and questions about two pictures together."""

from __future__ import annotations

from builders.demo import asking
from builders.demo.asking import Asked, Asker, Spec, View, matching
from builders.demo.drawing import COLOURS, KINDS, Scene


def _it(view: View, key: str) -> Asked | None:
    """A question about "it", the one shape the last turn spoke of."""
    shape = view.before.about if view.before else None
    if shape is None:
        return None
    question = view.language.questions[key]
    if key == "what_colour":
        answer = view.say("it_is_colour", c=view.colour(shape))
    elif key == "where_is_it":
        answer = view.say("it_is_at", at=view.at(shape))
    else:
        spec = Spec(kind=shape.kind)
        answer = view.say("it_is_shape", a=view.a(spec), the=view.word(spec))
    return Asked("follow", view.rng.choice(question), answer, shape)


def its_colour(view: View) -> Asked | None:
    """The colour of "it"."""
    return _it(view, "what_colour")


def its_place(view: View) -> Asked | None:
    """The place of "it"."""
    return _it(view, "where_is_it")


def its_shape(view: View) -> Asked | None:
    """The kind of "it"."""
    return _it(view, "what_shape")


def what_else(view: View) -> Asked | None:
    """Whatever the picture shows besides "it"."""
    shape = view.before.about if view.before else None
    if shape is None:
        return None
    rest = [other for other in view.scene.shapes if other is not shape]
    answer = view.say("else", list=view.listing(rest)) if rest else view.say("no_else")
    return Asked("follow", view.rng.choice(view.language.questions["what_else"]).format(pic=""), answer)


# Which questions "And the square?" may follow, and what it then asks for.
_REPEATS = {"colour_of": "and_the", "where": "and_the", "count": "count_more", "exist": "and_exist"}


def repeat(view: View, name: str) -> Asked | None:
    """The last question once more about another shape: "And the square?"; ``name`` is the asker's who asked it."""
    if name in ("shape_at", "what_at", "colour_at"):
        place = view.rng.choice(view.scene.shapes).place
        found = view.scene.find(place=place)
        if len(found) != 1:
            return None
        shape, spec = found[0], Spec(kind=found[0].kind)
        question = view.rng.choice(view.language.questions["and_at"]).format(at=view.language.places[place])
        if name == "colour_at":
            answer = view.say("it_is_colour", c=view.colour(shape))
        elif name == "shape_at":
            answer = view.say("it_is_shape", a=view.a(spec), the=view.word(spec))
        else:
            thing = view.a(asking.full(shape))
            answer = view.say("a_thing", A=thing[0].upper() + thing[1:])
        return Asked("follow", question, answer, shape)
    if name not in _REPEATS:
        return None
    spec = _subject(view, name)
    found = matching(view.scene, spec)
    if name in ("colour_of", "where") and len(found) != 1:
        return None
    words = {
        "the": view.word(spec, asking=True),
        "a": view.a(spec, asking=True),
        "many": view.word(spec, plural=True, asking=True),
    }
    question = view.rng.choice(view.language.questions[_REPEATS[name]]).format(**words)
    about = found[0] if len(found) == 1 else None
    return Asked("follow", question, _answer(view, name, spec), about)


def _subject(view: View, name: str) -> Spec:
    if name == "colour_of":
        return Spec(kind=view.rng.choice(KINDS))
    shape = view.rng.choice(view.scene.shapes)
    kind = shape.kind if view.rng.random() < 0.7 or name == "where" else view.rng.choice(KINDS)
    colour = shape.colour if view.rng.random() < 0.7 or name == "where" else view.rng.choice(COLOURS)
    return view.rng.choice((Spec(colour, kind), Spec(None, kind), Spec(colour, None)))


def _answer(view: View, name: str, spec: Spec) -> str:
    found = matching(view.scene, spec)
    if name == "colour_of":
        return view.say("colour_of", the=view.word(spec), c=view.colour(found[0]))
    if name == "where":
        return view.say("where", the=view.word(spec), at=view.at(found[0]))
    return asking.count_answer(view, spec) if name == "count" else asking.exist_answer(view, spec)


def _shared_spec(view: View, scenes: tuple[Scene, ...]) -> Spec:
    near = view.rng.choice(view.rng.choice(scenes).shapes)
    colour = near.colour if view.rng.random() < 0.75 else view.rng.choice(COLOURS)
    kind = near.kind if view.rng.random() < 0.75 else view.rng.choice(KINDS)
    return view.rng.choice((Spec(colour), Spec(None, kind), Spec(None, kind), Spec(colour, kind)))


def which_more(view: View) -> Asked | None:
    """Which picture has more of something."""
    spec = Spec() if view.rng.random() < 0.5 else _shared_spec(view, view.others)
    n, m = (len(matching(scene, spec)) for scene in view.others)
    question = view.rng.choice(view.language.questions["which_more"]).format(many=view.word(spec, True, asking=True))
    key = "more_same" if n == m else "more_first" if n > m else "more_second"
    return Asked("two", question, view.say(key, many=view.word(spec, True), n=n, m=m))


def both_have(view: View) -> Asked | None:
    """Whether both pictures have something."""
    spec = _shared_spec(view, view.others)
    first, second = (bool(matching(scene, spec)) for scene in view.others)
    words = {"a": view.a(spec, asking=True), "the": view.word(spec, asking=True)}
    question = view.rng.choice(view.language.questions["both"]).format(**words)
    key = {(True, True): "both_yes", (True, False): "both_first", (False, True): "both_second"}.get((first, second))
    return Asked("two", question, view.say(key or "both_none", a=view.a(spec), the=view.word(spec)))


def sum_both(view: View) -> Asked | None:
    """How many there are in each picture and in both."""
    spec = Spec() if view.rng.random() < 0.6 else _shared_spec(view, view.others)
    n, m = (len(matching(scene, spec)) for scene in view.others)
    question = view.rng.choice(view.language.questions["sum"]).format(many=view.word(spec, True, asking=True))
    return Asked("two", question, view.say("sum", n=n, m=m, total=n + m))


IT_ASKERS: dict[Asker, float] = {its_colour: 3, its_place: 3, its_shape: 2, what_else: 2}
PAIR_ASKERS: dict[Asker, float] = {which_more: 4, both_have: 4, sum_both: 3}
