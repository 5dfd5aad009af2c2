"""Conversations as training batches: token ids, labels on the model's turns alone, several conversations in one row.

Rows hold whole conversations one after another; ``document`` tells them apart and positions restart with each, so
packing changes nothing for the model (see `train.attention_masks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from builders.demo.drawing import cell_labels, model_pixels, render
from builders.demo.model import (
    END_OF_IMAGE,
    END_OF_TURN,
    IMAGE_SIZE,
    IMAGE_SOFT_TOKEN,
    MM_TOKENS_PER_IMAGE,
    START_OF_TURN,
)
from builders.demo.questions import TRAINING, Conversation, Turn, conversation

IGNORED = -100
NEWLINE = 9
CELLS = round(MM_TOKENS_PER_IMAGE**0.5)
PICTURES_PER_ROW = 4.5  # room for pictures in a batch, per row
WAITING = 12  # conversations that found no room in a batch before it is called full; they go into the next
PICTURE = "\n\n<start_of_image><end_of_image>\n\n"
Batch = dict[str, torch.Tensor]


def _user_text(turn: Turn) -> str:
    pictures = PICTURE * turn.pictures
    return turn.user + pictures if turn.pictures_last else pictures + turn.user


def chat_text(talk: Conversation) -> str:
    """The conversation as the chat template and the processor write it, without the image tokens themselves."""
    parts = ["<bos>"]
    prefix = f"{talk.system}\n\n" if talk.system else ""
    for turn in talk.turns:
        parts.append(f"<start_of_turn>user\n{prefix}{_user_text(turn)}<end_of_turn>\n")
        parts.append(f"<start_of_turn>model\n{turn.answer}<end_of_turn>\n")
        prefix = ""
    return "".join(parts)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation: ``ids`` and ``labels`` (next-token targets, `IGNORED` outside answers), both (length,)."""

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    pixels: list[npt.NDArray[np.uint8]]
    cells: list[npt.NDArray[np.int64]]


def encode_text(tokenizer: Tokenizer, talk: Conversation) -> tuple[list[int], list[int]]:
    """Token ids, with the image tokens in place, and next-token labels of the same length."""
    ids: list[int] = []
    labels: list[int] = []
    speaker, answering = 0, False
    for token in tokenizer.encode(chat_text(talk), add_special_tokens=False).ids:
        if token == END_OF_IMAGE:
            ids += [IMAGE_SOFT_TOKEN] * MM_TOKENS_PER_IMAGE
            labels += [IGNORED] * MM_TOKENS_PER_IMAGE
        if labels and answering:
            labels[-1] = token
        ids.append(token)
        labels.append(IGNORED)
        if token == START_OF_TURN:
            speaker += 1
        elif token == NEWLINE and speaker % 2 == 0 and ids[-3] == START_OF_TURN:
            answering = True
        elif token == END_OF_TURN:
            answering = False
    return ids, labels


def encode(tokenizer: Tokenizer, talk: Conversation, longest: int) -> Encoded:
    """``talk`` with its pictures drawn; trailing turns are left off until it fits ``longest`` tokens."""
    ids, labels = encode_text(tokenizer, talk)
    while len(ids) > longest:
        turns = talk.turns[:-1]
        shown = sum(turn.pictures for turn in turns)
        talk = Conversation(talk.scenes[:shown], turns, talk.system)
        ids, labels = encode_text(tokenizer, talk)
    pixels = [model_pixels(render(scene), IMAGE_SIZE) for scene in talk.scenes]
    cells = [cell_labels(scene, CELLS) for scene in talk.scenes]
    return Encoded(np.asarray(ids, np.int64), np.asarray(labels, np.int64), pixels, cells)


@dataclass
class Packer:
    """Fills ``rows`` rows of ``length`` tokens with whole conversations."""

    rows: int
    length: int
    used: list[int] = field(default_factory=list)
    pictures: int = 0

    def __post_init__(self) -> None:
        shape = (self.rows, self.length)
        room = int(self.rows * PICTURES_PER_ROW)
        self.used = [0] * self.rows
        self.ids, self.position, self.document = (np.zeros(shape, np.int64) for _ in range(3))
        self.labels, self.feature = np.full(shape, IGNORED, np.int64), np.full(shape, -1, np.int64)
        self.pixels = np.zeros((room, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        self.cells = np.full((room, MM_TOKENS_PER_IMAGE), IGNORED, np.int64)
        self.documents = 0

    def add(self, talk: Encoded) -> bool:
        """Place ``talk`` in the first row with room; ``False`` if there is none, or no room for its pictures."""
        size = len(talk.ids)
        if self.pictures + len(talk.pixels) > len(self.pixels):
            return False
        row = next((row for row, used in enumerate(self.used) if used + size <= self.length), None)
        if row is None:
            return False
        self.documents += 1
        span = slice(self.used[row], self.used[row] + size)
        self.ids[row, span], self.labels[row, span] = talk.ids, talk.labels
        self.position[row, span], self.document[row, span] = np.arange(size), self.documents
        soft = np.flatnonzero(talk.ids == IMAGE_SOFT_TOKEN)
        self.feature[row, self.used[row] + soft] = self.pictures * MM_TOKENS_PER_IMAGE + np.arange(len(soft))
        for pixels, cells in zip(talk.pixels, talk.cells, strict=True):
            self.pixels[self.pictures], self.cells[self.pictures] = pixels, cells
            self.pictures += 1
        self.used[row] += size
        return True

    def batch(self) -> Batch:
        """The rows as tensors: ids, labels, position, document, feature (rows, length) int64; pixels (n, 3, H, W) uint8;
        cells (n, image tokens) int64. ``feature`` indexes the flattened image features, −1 at text.
        """
        arrays = {
            "ids": self.ids, "labels": self.labels, "position": self.position, "document": self.document,
            "feature": self.feature, "cells": self.cells, "pixels": self.pixels.transpose(0, 3, 1, 2).copy(),
        }  # fmt: skip
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class TrainingBatches(IterableDataset[Batch]):
    """Endless packed batches. Each worker takes every n-th conversation of the training stream from ``first`` on."""

    def __init__(self, checkpoint: Path, rows: int, length: int, seed: int, first: int = 0) -> None:
        self.checkpoint, self.rows, self.length, self.seed, self.first = checkpoint, rows, length, seed, first

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        index, stride = self.first + (worker.id if worker else 0), worker.num_workers if worker else 1
        tokenizer = Tokenizer.from_file(str(self.checkpoint / "tokenizer.json"))
        packer, waiting = Packer(self.rows, self.length), list[Encoded]()
        while True:
            talk = encode(tokenizer, conversation(TRAINING, self.seed, index), self.length)
            index += stride
            if not packer.add(talk):
                waiting.append(talk)
            if len(waiting) >= WAITING:
                yield packer.batch()
                packer = Packer(self.rows, self.length)
                waiting = [talk for talk in waiting if not packer.add(talk)]
