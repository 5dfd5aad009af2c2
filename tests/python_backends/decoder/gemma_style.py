"""A small tokenizer of Gemma's kind, with the masks of its grammars as sets, for the tests of structured output."""

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from python_backends.decoder.detokenizer import Detokenizer
from python_backends.decoder.grammar import Grammar, GrammarCompiler, Matcher
from python_backends.decoder.token_bytes import TokenBytes

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
EOS = (1, 5)
PADDING_ROWS = 37  # of the embedding table, beyond the tokenizer's pieces
PIECES = Regex("▁?[A-Za-z]+|▁?[0-9]|[^A-Za-z0-9]{1,3}")
CORPUS = [
    json.dumps(
        {"name": "Anna Lee", "age": 42, "tags": ["red", "read"], "ok": True, "none": None, "x": -1.5e3}, indent=2
    ),
    '{"name": "get_weather", "parameters": {"city": "北京", "note": "\\u00e9 \\n \\"quoted\\""}}',
    "the quick brown fox reads the weather report in the north aaa bbb abab (a+b) 2024-01-31",
] * 4


def gemma_style(corpus: Sequence[str], size: int) -> Tokenizer:
    """Byte-fallback BPE as Gemma's: special tokens, line feeds, all bytes, ``▁`` for a space."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(PIECES, behavior="isolated")
    learner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size, min_frequency=1, show_progress=False))
    state = json.loads(learner.to_str())["model"]
    pieces = [*SPECIAL, "\n", "\n\n", *(f"<0x{byte:02X}>" for byte in range(256)), *state["vocab"]]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [(left, right) for left, right in state["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL])
    return tokenizer


class Setup:
    """A tokenizer with everything the tests ask of it."""

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int] = EOS) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size() + PADDING_ROWS
        self.tokens = TokenBytes(tokenizer, self.vocab_size, eos)
        self.compiler = GrammarCompiler(self.tokens)
        self.eos = set(eos)
        self.bytes = [b""] * self.vocab_size
        for token in range(tokenizer.get_vocab_size()):
            piece = tokenizer.id_to_token(token)
            is_byte = len(piece) == 6 and piece.startswith("<0x")
            self.bytes[token] = bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()

    def grammar(self, response_format: object) -> Grammar:
        grammar = self.compiler.compile(response_format)
        assert grammar is not None
        return grammar

    def row(self) -> NDArray[np.int32]:
        return np.zeros(self.tokens.mask_words, np.int32)

    def allowed(self, matcher: Matcher) -> set[int]:
        out = self.row()
        matcher.mask(out)
        return set(np.flatnonzero(np.unpackbits(out.view(np.uint8), bitorder="little")).tolist())

    def text(self, tokens: Sequence[int]) -> str:
        detokenizer = Detokenizer(self.tokenizer)
        return "".join(map(detokenizer.add, tokens)) + detokenizer.finish()

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def walk(
        self, matcher: Matcher, rng: np.random.Generator, patience: int = 40, limit: int = 600
    ) -> list[int] | None:
        """Draw by random logits under the mask until the end; None if ``limit`` tokens do not suffice.

        After ``patience`` tokens, short tokens that close something are preferred, or strings would never end.
        """
        drawn: list[int] = []
        closing = np.array(
            [4.0 * text.lstrip().startswith((b'"', b"}", b"]", b")")) - len(text) for text in self.bytes]
        )
        closing[list(self.eos)] = 9
        while len(drawn) < limit:
            allowed = np.array(sorted(self.allowed(matcher)))
            logits = rng.gumbel(size=self.vocab_size) + closing * (len(drawn) > patience)
            token = int(allowed[np.argmax(logits[allowed])])
            matcher.accept(token)
            if token in self.eos:
                return drawn
            drawn.append(token)
        return None


def small_setup() -> Setup:
    """A vocabulary small enough to try every token at every step."""
    return Setup(gemma_style(["ab abab ba abc 01 0110 (a) ((a)) a+b )) é日本 ab(ab)"] * 3, 40))
