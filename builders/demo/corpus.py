"""The text the tokenizer's pieces are learned from: conversations of the training stream, as the model reads them."""

from __future__ import annotations

from collections.abc import Iterator

from builders.demo.questions import LANGUAGES, TRAINING, conversation

CONVERSATIONS = 3000


def corpus(conversations: int = CONVERSATIONS) -> Iterator[str]:
    """Every user and model turn, and each fixed phrase several times, so that rare words get pieces too."""
    for index in range(conversations):
        talk = conversation(TRAINING, 0, index)
        for turn in talk.turns:
            yield turn.user
            yield turn.answer
    yield from ("user", "model", "user", "model") * conversations
    for language in LANGUAGES:
        fixed = [*language.system_prompts, *language.courtesies]
        for phrasings, answer in language.small_talk.values():
            fixed += [*phrasings, answer]
        for phrase in fixed:
            yield from (phrase,) * 8
