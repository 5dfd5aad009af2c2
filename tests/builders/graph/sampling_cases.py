"""Every sampling parameter with the distribution that it must leave: transformers' processors, or OpenAI's definition.

A case is (inputs of the sampling graph, what makes the logits of the wanted distribution of `logits_of(1)`).
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.builders.graph.sampling_graph import V, listed, logits_of, words_of

SEEN = [3, 7, 7, 7, 11, 30, 30, 95]
"""Tokens of an answer so far, some of them several times."""
PROMPT = [1, 7, 50]
ALLOWED = np.random.default_rng(7).random(V) < 0.5


def counted(ids):
    return np.unique(ids, return_counts=True)


def processed(*processors, ids=()):
    """Logits (logits_of(1)) after some of transformers' processors."""
    scores = torch.tensor(logits_of(1))[None]
    for processor in processors:
        scores = processor(torch.tensor(list(ids))[None], scores)
    return scores[0].numpy()


def openai(presence=0.0, frequency=0.0):
    """μ[j] − c[j] · frequency − (c[j] > 0) · presence, the API reference's formula."""
    logits = logits_of(1).copy()
    for token, count in zip(*counted(SEEN), strict=True):
        logits[token] -= count * frequency + presence
    return logits


def openai_list(presence=0.0, frequency=0.0):
    ids, counts = counted(SEEN)
    return listed(ids, bias=-(counts * frequency) - presence, padding=3)


def masked():
    return processed(SuppressTokensLogitsProcessor(np.flatnonzero(~ALLOWED).tolist()))


def everything():
    logits = processed(RepetitionPenaltyLogitsProcessor(1.3), ids=SEEN)
    logits[np.unique(SEEN)] -= 0.4
    scores = torch.tensor(logits)[None]
    for processor in (
        SuppressTokensLogitsProcessor(np.flatnonzero(~ALLOWED).tolist()),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(25),
        TopPLogitsWarper(0.95),
        MinPLogitsWarper(0.01),
    ):
        scores = processor(torch.zeros((1, 0), dtype=torch.long), scores)
    return scores[0].numpy()


CASES = {
    "temperature": ({"temperature": 0.4}, lambda: processed(TemperatureLogitsWarper(0.4))),
    "high temperature": ({"temperature": 3.0}, lambda: processed(TemperatureLogitsWarper(3.0))),
    "top_k": ({"top_k": 7}, lambda: processed(TopKLogitsWarper(7))),
    "top_p": ({"top_p": 0.8}, lambda: processed(TopPLogitsWarper(0.8))),
    "min_p": ({"min_p": 0.03}, lambda: processed(MinPLogitsWarper(0.03))),
    "repetition penalty": (
        listed(np.unique(PROMPT + SEEN), factor=1.7, padding=5),
        lambda: processed(RepetitionPenaltyLogitsProcessor(1.7), ids=PROMPT + SEEN),
    ),
    "repetition reward": (
        listed(np.unique(PROMPT + SEEN), factor=0.6),
        lambda: processed(RepetitionPenaltyLogitsProcessor(0.6), ids=PROMPT + SEEN),
    ),
    "presence penalty": (openai_list(presence=1.3), lambda: openai(presence=1.3)),
    "frequency penalty": (openai_list(frequency=0.7), lambda: openai(frequency=0.7)),
    "negative penalties": (openai_list(-1.0, -0.5), lambda: openai(-1.0, -0.5)),
    "logit bias": (
        listed([0, 5, V - 1], bias=[4.0, -100.0, 6.5]),
        lambda: processed(SequenceBiasLogitsProcessor([[[0], 4.0], [[5], -100.0], [[V - 1], 6.5]])),
    ),
    "mask": ({"token_mask": words_of(ALLOWED)[None, None]}, masked),
    "everything": (
        {
            **listed(np.unique(SEEN), factor=1.3, bias=-0.4, padding=1),
            "token_mask": words_of(ALLOWED)[None, None],
            "temperature": 0.7,
            "top_k": 25,
            "top_p": 0.95,
            "min_p": 0.01,
        },
        everything,
    ),
}


def drawn(run, inputs, uniform):
    """How often each token is drawn by the numbers ``uniform`` [R]."""
    count = len(uniform)
    inputs = {"temperature": 1.0, **inputs}
    inputs = {name: value if np.ndim(value) > 1 else np.full(1, value) for name, value in inputs.items()}
    if "token_mask" in inputs:
        inputs["token_mask"] = np.repeat(inputs["token_mask"], count, axis=1)
    outputs = run(np.broadcast_to(logits_of(1), (1, count, V)), **inputs, uniform=uniform[None])
    return np.bincount(outputs["next_token"][0], minlength=V)


def p_value(found, wanted):
    """Of Pearson's chi-square test."""
    statistic = ((found - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2)))
