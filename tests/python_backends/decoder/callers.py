"""Callers of an engine, for its tests."""

import threading

import numpy as np
from tokenizers import Tokenizer, decoders, models

from python_backends.decoder.parameters import Parameters
from python_backends.decoder.sequence import Request
from tests.checkpoints import FIRST_TEXT, VOCAB

WAIT_S = 60


def word_tokenizer():
    """One word per id, so that text shows which tokens were drawn."""
    built = Tokenizer(models.WordLevel({f"w{token} ": token for token in range(VOCAB)}, unk_token="w3 "))
    built.decoder = decoders.Fuse()
    return built


class Caller:
    """A request and all it was answered; `answer` picks one of several."""

    def __init__(self, ids, request_id="", grammar=None, **parameters):
        self.pieces = []
        self.ended = threading.Event()
        self.cancelled = False
        parameters = Parameters(**({"max_tokens": 8, "ignore_eos": True} | parameters))
        self.open = parameters.n
        self.request = Request(
            ids,
            parameters,
            self.receive,
            request_id=request_id,
            is_cancelled=lambda: self.cancelled,
            grammar=grammar,
        )

    def receive(self, piece):
        assert not self.ended.is_set(), "a piece after the last"
        self.pieces.append(piece)
        if piece.finish_reason:
            self.open -= 1
            if not self.open:
                self.ended.set()

    def to(self, engine):
        engine.submit(self.request)
        return self

    def wait(self):
        assert self.ended.wait(WAIT_S), "never answered"
        return self

    def answer(self, index=0):
        return [piece for piece in self.pieces if piece.index == index]

    def tokens_of(self, index):
        return [token for piece in self.answer(index) for token in piece.token_ids]

    def logprobs_of(self, index):
        return [value for piece in self.answer(index) for value in piece.logprobs]

    @property
    def tokens(self):
        return self.tokens_of(0)

    @property
    def text(self):
        return "".join(piece.text for piece in self.answer())

    @property
    def last(self):
        return self.answer()[-1]


def prompt(seed, length):
    return np.random.default_rng(seed).integers(FIRST_TEXT, 500, length).tolist()


def alone(engine, *args, **parameters):
    return Caller(*args, **parameters).to(engine).wait()
