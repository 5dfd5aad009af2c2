"""Text and bytes of single tokens, for log-probabilities: OpenAI's API names tokens by them and not by ids."""

from __future__ import annotations

import functools
from pathlib import Path

from tokenizers import Tokenizer

from python_backends import contract, manifest
from python_backends.decoder.detokenizer import BYTE_TOKEN
from python_backends.errors import ArtifactError

SPACE = "▁"  # how Gemma's BPE spells a space


class Vocabulary:
    """The tokenizer of a model repository, read when it is first needed."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        path = manifest.read(self._repository).folder(contract.TOKENIZER) / "tokenizer.json"
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"{path} is not a tokenizer ({error}); rebuild with `wicore build --force`") from error

    def load(self) -> None:
        """Read the tokenizer now (0.1 to 1 s); raises ArtifactError."""
        _ = self._tokenizer

    def token(self, token_id: int) -> tuple[str, list[int]]:
        """Its text, and its bytes; a token that is part of a character has U+FFFD for a text."""
        piece = self._tokenizer.id_to_token(token_id) or ""
        byte = BYTE_TOKEN.fullmatch(piece)
        data = bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()
        return data.decode(errors="replace"), list(data)
