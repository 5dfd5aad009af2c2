"""The bytes each token writes into the answer: what a grammar matches against."""

from __future__ import annotations

from collections.abc import Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from python_backends.decoder.detokenizer import BYTE_TOKEN
from python_backends.errors import ArtifactError

SPACE = "▁"  # how Gemma's BPE spells a space


class TokenBytes:
    """A model's vocabulary as llguidance takes it, without transformers and without a second copy of the tokenizer.

    Only the bytes matter: masks are exact (see `grammar`), so nothing is ever tokenized. Special tokens write no text
    and rows beyond the tokenizer's pieces (padding of the embedding table) have no piece; neither can match.

    Args:
        tokenizer: byte-fallback BPE with ``▁`` for a space, as in Gemma's tokenizer.json.
        vocab_size: V, the width of the logits; at least the tokenizer's.
        eos_token_ids: each of them ends an answer.

    Raises:
        ArtifactError: logits narrower than the vocabulary, or no end-of-sequence token inside it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        pieces: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        last = max(pieces.values())
        if last >= vocab_size:
            raise ArtifactError(f"tokenizer.json has token {last} but the model {vocab_size} logits; build again")
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(sorted(set(eos_token_ids)))
        if not self.eos_token_ids or not 0 <= self.eos_token_ids[0] <= self.eos_token_ids[-1] < vocab_size:
            raise ArtifactError(f"end-of-sequence ids {self.eos_token_ids} lie outside 0 … {vocab_size - 1}")
        added = tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}.union(self.eos_token_ids)
        texts = [b""] * vocab_size
        for piece, number in pieces.items():
            texts[number] = _text(piece)
        self.llguidance = llguidance.LLTokenizer(
            _Wrapper(texts, self.eos_token_ids[0], sorted(special)),  # type: ignore[arg-type]
            eos_token=list(self.eos_token_ids),
        )

    @property
    def mask_words(self) -> int:
        """Width of a mask: ceil(V / 32) int32 words."""
        return (self.vocab_size + 31) // 32

    def write_eos_mask(self, out: NDArray[np.int32]) -> None:
        """Allow the end-of-sequence ids alone in ``out`` [ceil(V / 32)]."""
        words = out.view(np.uint32)
        words[:] = 0
        for token in self.eos_token_ids:
            words[token // 32] |= np.uint32(1 << token % 32)


def _text(piece: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


class _Wrapper:
    """The attributes that LLTokenizer reads; its own wrapper class tries the tokenizer out on bytes first."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], eos_token_id: int, special_token_ids: list[int]) -> None:
        self.tokens = tokens
        self.eos_token_id = eos_token_id
        self.special_token_ids = special_token_ids

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError(f"masks are exact, so {text!r} is never tokenized")
