"""Whether an answer is right: the same text but for case, spaces and marks; descriptions by what they list."""

from __future__ import annotations

import re
import unicodedata

from builders.demo.questions import LANGUAGE_OF


def normalised(text: str) -> str:
    """``text`` in lower case with single spaces and no punctuation at its end."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return re.sub(r"\s+", " ", folded).strip().rstrip(".!?。 ")


def listed(text: str, language: str) -> list[tuple[str, str, str]] | None:
    """The (colour, kind, place) words a description lists, sorted; ``None`` where some part of it is no such thing."""
    words = LANGUAGE_OF[language]
    colour, kind = "|".join(words.colours.values()), "|".join(names[0] for names in words.kinds.values())
    place = "|".join(sorted(words.places, key=len, reverse=True))
    if language == "zh":
        pattern = rf"(?P<place>{place})有一个(?P<colour>{colour})的(?P<kind>{kind})"
    else:
        pattern = rf"an? (?P<colour>{colour}) (?P<kind>{kind}) (?P<place>{place})"
    found = sorted((m["colour"], m["kind"], m["place"]) for m in re.finditer(pattern, text))
    rest = re.sub(pattern, "", text)
    return None if re.search(rf"{colour}|{kind}", rest) else found


def is_right(answer: str, expected: str, category: str, language: str) -> bool:
    """Whether ``answer`` says what ``expected`` does; the order in which a description lists things is free."""
    if normalised(answer) == normalised(expected):
        return True
    if category != "describe":
        return False
    counts = [re.findall(r"[0-9]+", text) for text in (answer, expected)]
    wanted = listed(expected, language)
    return bool(wanted) and counts[0] == counts[1] and listed(answer, language) == wanted
