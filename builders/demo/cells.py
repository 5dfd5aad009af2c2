# mypy: disable-error-code="misc, untyped-decorator"
"""What each image token should know of its cell of the picture: the helper task beside the conversations.

The labels name everything a question may need (which shape covers the cell, where its centre lies, how large it is and
whether it is the largest), so that the vision tower learns to see without waiting for the text model to ask.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from builders.demo.asking import clearly_larger
from builders.demo.drawing import COLOURS, KINDS, MAX_SIZE, MIN_SIZE, Scene, Shape
from builders.demo.model import MM_TOKENS_PER_IMAGE

IGNORED = -100
THINGS = 1 + len(KINDS) * len(COLOURS)  # nothing, or 1 + kind · 8 + colour
SIZES = 16
FINE = 5
CELLS = round(MM_TOKENS_PER_IMAGE**0.5)  # along one side of the picture
HEADS = {
    "cover": THINGS,  # what covers the cell
    "centre": THINGS,  # whose centre lies in the cell
    "size": SIZES,  # of the shape whose centre it is, in steps of equal ratio
    "rank": 4,  # that shape is neither, clearly the smallest, clearly the largest, or alone
    "x": FINE,  # where in the cell the centre lies
    "y": FINE,
    "count": 4,  # shapes in the whole picture − 1
    "same kind": 4,  # shapes in the picture of that kind − 1, of that colour, of both
    "same colour": 4,
    "same": 4,
    "column": CELLS,  # of the cell itself
    "row": CELLS,
}
WEIGHTS = {
    "cover": 0.5, "centre": 1.0, "size": 0.25, "rank": 0.2, "x": 0.2, "y": 0.2, "count": 0.3,
    "same kind": 0.3, "same colour": 0.3, "same": 0.3, "column": 0.2, "row": 0.2,
}  # fmt: skip
_SMALLEST, _LARGEST = MIN_SIZE / math.sqrt(1.4), MAX_SIZE


def _size_step(shape: Shape, scene: Scene) -> int:
    apparent = shape.size * min(scene.width, scene.height) / math.sqrt(scene.width * scene.height)
    step = int(SIZES * math.log(apparent / _SMALLEST) / math.log(_LARGEST / _SMALLEST))
    return min(SIZES - 1, max(0, step))


def _rank(shape: Shape, scene: Scene) -> int:
    others = [other for other in scene.shapes if other is not shape]
    if not others:
        return 3
    if all(clearly_larger(shape, other) for other in others):
        return 2
    return 1 if all(clearly_larger(other, shape) for other in others) else 0


def cell_labels(scene: Scene) -> npt.NDArray[np.int64]:
    """Labels of the picture's cells in row-major order: (CELLS², len(HEADS)), `IGNORED` where moot."""
    cells = CELLS
    labels = np.full((cells, cells, len(HEADS)), IGNORED, np.int64)
    labels[..., 0], labels[..., 1], labels[..., 6] = 0, 0, len(scene.shapes) - 1
    labels[..., 10], labels[..., 11] = np.arange(cells)[None, :], np.arange(cells)[:, None]
    middle = (np.arange(cells) + 0.5) / cells
    short = min(scene.width, scene.height)
    for shape in scene.shapes:
        thing = 1 + KINDS.index(shape.kind) * len(COLOURS) + COLOURS.index(shape.colour)
        reach = shape.radius * 0.7 * short
        dx, dy = (middle - shape.x) * scene.width / reach, (middle - shape.y) * scene.height / reach
        labels[..., 0][dx[None, :] ** 2 + dy[:, None] ** 2 <= 1] = thing
    for shape in scene.shapes:
        thing = 1 + KINDS.index(shape.kind) * len(COLOURS) + COLOURS.index(shape.colour)
        column, row = int(shape.x * cells), int(shape.y * cells)
        fine = (int((shape.x * cells - column) * FINE), int((shape.y * cells - row) * FINE))
        labels[row, column, :6] = (thing, thing, _size_step(shape, scene), _rank(shape, scene), *fine)
        alike = (scene.find(kind=shape.kind), scene.find(shape.colour), scene.find(shape.colour, shape.kind))
        labels[row, column, 7:10] = [len(found) - 1 for found in alike]
    return labels.reshape(cells * cells, len(HEADS))


class CellHead(nn.Linear):
    """One linear map from image tokens to the scores of every label."""

    def __init__(self, width: int) -> None:
        super().__init__(width, sum(HEADS.values()))

    def losses(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted cross-entropy of (n, cells, width) features for (n, cells, labels), and each label's share right."""
        scores = self(features).flatten(0, 1).split(list(HEADS.values()), -1)
        total, right = features.new_zeros(()), dict[str, torch.Tensor]()
        for (name, score), wanted in zip(zip(HEADS, scores, strict=True), labels.flatten(0, 1).unbind(-1), strict=True):
            loss = nn.functional.cross_entropy(score, wanted, ignore_index=IGNORED, reduction="sum")
            counted = wanted != IGNORED
            total = total + WEIGHTS[name] * loss / counted.sum().clamp_min(1)
            if name in ("cover", "centre"):
                counted = wanted > 0  # the background is easy
            hits = (score.argmax(-1) == wanted) & counted
            right[name] = (hits.sum() / counted.sum().clamp_min(1)).detach()
        return total, right
