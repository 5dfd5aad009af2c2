"""What the gateway does for each token is done the short way, and gives what the long way would."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from client.answer import Piece
from client.gateway.histogram import TokenHistogram
from client.gateway.metrics import INTER_TOKEN_S
from client.gateway.openai.chat import _Chunks
from client.gateway.openai.requests import ChatRequest

NOTHING: Any = SimpleNamespace(vocabulary=None, settings=SimpleNamespace(model='odd "name"\n'))


def chunks(*, usage: bool) -> _Chunks:
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "stream_options": {"include_usage": usage}}
    return _Chunks(ChatRequest.model_validate(body), NOTHING, "id")


@given(text=st.text(min_size=1), index=st.integers(0, 15), usage=st.booleans())
def test_an_event_of_text_alone_is_the_one_that_json_would_write(text: str, index: int, usage: bool) -> None:
    made = chunks(usage=usage)
    piece = Piece(text, (5,), (-1.0,), index=index)
    assert made._plain(piece) == "", "the first has a role"
    made._choice(piece)
    whole = made._chunk([made._choice(piece)])
    assert made._plain(piece) == whole
    assert json.loads(whole)["choices"][0]["delta"] == {"content": text}


@given(st.lists(st.tuples(st.sampled_from([*INTER_TOKEN_S, 0.0, 0.0011, 0.3, 9.0]), st.integers(1, 4))))
def test_the_histogram_is_the_librarys(observed: list[tuple[float, int]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    short = TokenHistogram("x_seconds", "Text", INTER_TOKEN_S, ours)
    long = Histogram("x_seconds", "Text", buckets=INTER_TOKEN_S, registry=theirs)
    for value, count in observed:
        short.observe(value, count)
        for _ in range(count):
            long.observe(value)

    def lines(registry: CollectorRegistry) -> list[str]:
        text = generate_latest(registry).decode().splitlines()
        return [line for line in text if "_created" not in line and "_sum" not in line]

    assert lines(ours) == lines(theirs)
    assert abs(short._sum - sum(value * count for value, count in observed)) < 1e-9
