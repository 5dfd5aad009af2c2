"""Prompts of a given number of tokens, as text and as the ids the tokenizer stage makes of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from client.bench.load import Job
from python_backends import contract, manifest
from python_backends.errors import BuildError
from python_backends.prompt import open_tokenizer

_TRIES = 40


class Prompts:
    """Makes prompts of words of the model's own vocabulary, no two alike: none is served from another's KV.

    Raises:
        ArtifactError: the repository is not built.
        BuildError: a vocabulary without words.
    """

    def __init__(self, repository: Path, seed: int) -> None:
        built = manifest.read(repository)
        plain = Tokenizer.from_file(str(built.folder(contract.TOKENIZER) / "tokenizer.json"))
        self._words = sorted(
            token[1:] for token in plain.get_vocab() if token[0] == "▁" and token[1:].isascii() and token[1:].isalpha()
        )
        if not self._words:
            raise BuildError(f"the tokenizer in {repository} has no words to make prompts of")
        self._tokenize = open_tokenizer(repository)
        self._rng = random.Random(seed)

    def words(self, count: int) -> str:
        """So many words of the vocabulary."""
        return " ".join(self._rng.choices(self._words, k=count))

    def job(self, tokens: int, max_tokens: int) -> Job:
        """A prompt of ``tokens`` tokens, template and all; as near as its words come to that.

        Raises:
            BuildError: fewer tokens than the chat template has by itself.
        """
        words = self._rng.choices(self._words, k=max(1, tokens))
        count, best = len(words), None
        for _ in range(_TRIES):
            text = " ".join(["", *words[:count]])
            ids = tuple(int(token) for token in self._tokenize([text.encode()], [], []).input_ids)
            if best is None or abs(len(ids) - tokens) < abs(len(best[0]) - tokens):
                best = ids, text
            step = tokens - len(ids)
            moved = min(max(count + step, 1), len(words))
            if not step or moved == count:
                break
            count = moved
        assert best is not None
        ids, text = best
        if len(ids) > 2 * tokens:
            raise BuildError(f"the chat template alone has about {len(ids)} tokens; ask for prompts longer than that")
        return Job(ids, text, max_tokens)

    def stream(self, tokens: int, max_tokens: int) -> Iterator[Job]:
        """Such prompts without end."""
        while True:
            yield self.job(tokens, max_tokens)
