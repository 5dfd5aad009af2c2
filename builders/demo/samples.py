# mypy: disable-error-code="misc, untyped-decorator"
"""Conversations as training batches: token ids, labels on the model's turns alone, several conversations in one row.

Rows hold whole conversations one after another; ``document`` tells them apart and positions restart with each, so
packing changes nothing for the model (see `train.attention_masks`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from builders.demo.cells import HEADS, IGNORED, cell_labels
from builders.demo.drawing import model_pixels, render, sample_scene
from builders.demo.model import (
    END_OF_IMAGE,
    END_OF_TURN,
    IMAGE_SIZE,
    IMAGE_SOFT_TOKEN,
    MM_TOKENS_PER_IMAGE,
    START_OF_TURN,
)
from builders.demo.questions import PAIRS, TRAINING, Conversation, Turn, conversation

NEWLINE = 9
CATEGORIES = (
    "describe", "count", "colour", "shape", "where", "size", "relation", "exist", "compare", "follow", "two", "talk",
)  # fmt: skip
MANY = 64  # more turns than any conversation has, and more than there are categories
WAITING = 10  # conversations that found no room in a batch before it is called full; they go into the next
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
    """One conversation: ``ids``, ``labels`` (next-token targets, `IGNORED` outside answers) and ``question`` (which of
    `CATEGORIES` the turn asks, + 64 · number of the turn), all (length,).
    """

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    question: npt.NDArray[np.int64]
    pixels: list[npt.NDArray[np.uint8]]
    cells: list[npt.NDArray[np.int64]]


def encode_text(tokenizer: Tokenizer, talk: Conversation) -> tuple[list[int], list[int], list[int]]:
    """Token ids with the image tokens in place, next-token labels, and the turn's number, each of the same length."""
    ids: list[int] = []
    labels: list[int] = []
    turns: list[int] = []
    speaker, answering = 0, False
    for token in tokenizer.encode(chat_text(talk), add_special_tokens=False).ids:
        if token == END_OF_IMAGE:
            ids += [IMAGE_SOFT_TOKEN] * MM_TOKENS_PER_IMAGE
            labels += [IGNORED] * MM_TOKENS_PER_IMAGE
            turns += [max(0, speaker - 1) // 2] * MM_TOKENS_PER_IMAGE
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
        turns.append(max(0, speaker - 1) // 2)
    return ids, labels, turns


def encode(tokenizer: Tokenizer, talk: Conversation, longest: int) -> Encoded:
    """``talk`` with its pictures drawn; trailing turns are left off until it fits ``longest`` tokens."""
    ids, labels, turns = encode_text(tokenizer, talk)
    if len(ids) > longest:
        kept = talk.turns[: max(1, turns[longest])]
        shown = sum(turn.pictures for turn in kept)
        talk = Conversation(talk.scenes[:shown], kept, talk.system)
        ids, labels, turns = encode_text(tokenizer, talk)
    question = [CATEGORIES.index(talk.turns[turn].category) + MANY * turn for turn in turns]
    pixels = [model_pixels(render(scene), IMAGE_SIZE) for scene in talk.scenes]
    cells = [cell_labels(scene) for scene in talk.scenes]
    as_array = [np.asarray(values, np.int64) for values in (ids, labels, question)]
    return Encoded(as_array[0], as_array[1], as_array[2], pixels, cells)


@dataclass
class Packer:
    """Fills ``rows`` rows of ``length`` tokens with whole conversations, of at most ``room`` pictures."""

    rows: int
    length: int
    room: int
    used: list[int] = field(default_factory=list)
    pictures: int = 0

    def __post_init__(self) -> None:
        shape = (self.rows, self.length)
        self.used = [0] * self.rows
        self.ids, self.position, self.document = (np.zeros(shape, np.int64) for _ in range(3))
        self.labels, self.feature = np.full(shape, IGNORED, np.int64), np.full(shape, -1, np.int64)
        self.question = np.zeros(shape, np.int64)
        self.pixels = np.zeros((self.room, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        self.cells = np.full((self.room, MM_TOKENS_PER_IMAGE, len(HEADS)), IGNORED, np.int64)
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
        self.question[row, span] = talk.question + MANY * MANY * self.documents
        soft = np.flatnonzero(talk.ids == IMAGE_SOFT_TOKEN)
        self.feature[row, self.used[row] + soft] = self.pictures * MM_TOKENS_PER_IMAGE + np.arange(len(soft))
        for pixels, cells in zip(talk.pixels, talk.cells, strict=True):
            self.pixels[self.pictures], self.cells[self.pictures] = pixels, cells
            self.pictures += 1
        self.used[row] += size
        return True

    def batch(self) -> Batch:
        """The rows as tensors: ids, labels, position, document, feature, question (rows, length) int64;
        pixels (n, 3, H, W) uint8; cells (n, image tokens, labels) int64. ``feature`` indexes the flattened image
        features and is −1 at text.
        """
        arrays = {
            "ids": self.ids, "labels": self.labels, "position": self.position, "document": self.document,
            "feature": self.feature, "question": self.question, "cells": self.cells,
            "pixels": self.pixels.transpose(0, 3, 1, 2).copy(),
        }  # fmt: skip
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class ConversationBatches(IterableDataset[Batch]):
    """Endless packed batches. Each worker takes every n-th conversation of ``stream`` from ``first`` on."""

    def __init__(
        self, checkpoint: Path, *, rows: int, length: int, room: int, seed: int, first: int = 0, stride: int = 1,
        stream: str = TRAINING, turns_least: int = 1, pairs: float = PAIRS, practice: bool = False,
    ) -> None:  # fmt: skip
        self.checkpoint, self.rows, self.length, self.room = checkpoint, rows, length, room
        self.seed, self.first, self.stride, self.stream = seed, first, stride, stream
        self.turns_least, self.pairs, self.practice = turns_least, pairs, practice

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        index, stride = self.first + self.stride * (worker.id if worker else 0), self.stride * workers
        tokenizer = Tokenizer.from_file(str(self.checkpoint / "tokenizer.json"))
        packer, waiting = Packer(self.rows, self.length, self.room), list[Encoded]()
        while True:
            asked = conversation(self.stream, self.seed, index, self.turns_least, self.pairs, self.practice)
            talk = encode(tokenizer, asked, self.length)
            index += stride
            if not packer.add(talk):
                waiting.append(talk)
            if len(waiting) >= WAITING:
                yield packer.batch()
                packer = Packer(self.rows, self.length, self.room)
                waiting = [talk for talk in waiting if not packer.add(talk)]


class PictureBatches(IterableDataset[Batch]):
    """Endless batches of ``room`` pictures alone, with their cells' labels."""

    def __init__(self, room: int, seed: int, first: int, stride: int = 1) -> None:
        self.room, self.seed, self.first, self.stride = room, seed, first, stride

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = random.Random(f"{TRAINING}/pictures/{self.seed}/{self.first}/{worker.id if worker else 0}")
        while True:
            scenes = [sample_scene(rng) for _ in range(self.room)]
            pixels = np.stack([model_pixels(render(scene), IMAGE_SIZE) for scene in scenes])
            cells = np.stack([cell_labels(scene) for scene in scenes])
            yield {
                "pixels": torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
                "cells": torch.from_numpy(cells),
            }
