"""What a language needs so that questions about drawings can be asked and answered in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """The words of one language; every template is filled with `str.format`.

    Slots in templates: ``{pic}`` which picture ("" or e.g. " in the first picture"), ``{the}``/``{other}`` nouns
    without article, ``{a}`` with article, ``{many}``/``{others}`` plurals, ``{c}`` a colour, ``{at}`` a place,
    ``{list}`` a listing.
    """

    name: str
    kinds: Mapping[str, tuple[str, ...]]  # the first word is the one answers use
    colours: Mapping[str, str]
    places: tuple[str, ...]  # nine, in reading order, as they follow a noun or verb
    questions: Mapping[str, tuple[str, ...]]
    answers: Mapping[str, str]
    small_talk: Mapping[str, tuple[tuple[str, ...], str]]  # category → phrasings, answer
    pictures: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]  # the picture, the first, the second
    noun: Callable[[str | None, str | None, bool], str]  # (colour word, kind word, plural) → noun
    with_article: Callable[[str], str]
    listing: Callable[[list[tuple[str, str]]], str]  # [(noun, place)] → a listing
    counted: Callable[[int, str, str], str]  # (count, singular, plural) → "2 red circles"
    system_prompts: tuple[str, ...]
    courtesies: tuple[str, ...]
