"""The TensorRT plans of a GPU build: which graphs, for which shapes, and the index that describes them."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from builders.checkpoint import Checkpoint
from builders.graph.attention import CacheNames
from builders.graph.pieces import write_pieces
from builders.graph.single import write_single
from builders.graph.vision import vision_config
from builders.graph.vision_plan import write_vision_graph
from builders.model_config import TextConfig, VisionConfig
from builders.plan import PlanBuilder
from builders.quantize import PrecisionName
from python_backends.runtime.gpu.plans import FIRST, FORMAT, PIECES, SINGLE, VISION, Plan, PlanIndex, Profile

MAX_TOKENS = 4096
"""Most tokens of a step that plans take."""
TOKENS = (
    ("decode-8", 1, 8, 8),  # one row costs what eight do: the fastest read of a weight is that for eight rows
    ("decode-16", 9, 16, 16),
    ("verify", 17, 64, 128),  # drafts of several sequences
    ("prefill", 129, 2048, MAX_TOKENS),
)
"""Profiles over the tokens of a step: name, fewest, most frequent, most."""
STEPS = (
    ("decode", (1, 8, 16), (1, 1, 1), (1, 1, 1)),
    ("verify", (1, 8, 16), (2, 4, 8), (1, 4, 8)),
    ("prefill", (1, 1, 1), (9, 512, 2048), (1, 1, 8)),
)
"""Profiles of the decoder in one plan: name, then fewest, most frequent and most rows, positions, wanted positions."""
IMAGES = (("one", 1, 1, 1), ("several", 2, 4, 8))
"""Profiles over the images of a batch; the most is ``max_batch_size`` of the model's config.pbtxt."""


def plan_file(name: str) -> str:
    """The file of the plan ``name``."""
    return f"{name}.plan"


def piece_profiles(text: TextConfig, piece: str) -> list[Profile]:
    """The profiles of a piece of the decoder."""
    widths = {"stream": text.hidden_size}
    if piece != FIRST:
        widths["attended"] = text.num_heads * text.head_dim
    return [
        Profile(name, {tensor: tuple((tokens, width) for tokens in bounds) for tensor, width in widths.items()})
        for name, *bounds in TOKENS
    ]


def single_profiles(text: TextConfig, capacity: int, *, images: bool) -> list[Profile]:
    """The profiles of the decoder in one plan."""
    made = []
    cache = (text.num_kv_heads, capacity, text.head_dim)
    for name, *bounds in STEPS:
        shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        for b, s, r in zip(*bounds, strict=True):
            for tensor in ("past_len", "query_len"):
                shapes[tensor].append((b,))
            for tensor in ("input_ids", *(("image_index", "image_group") if images else ())):
                shapes[tensor].append((b, s))
            shapes["logit_positions"].append((b, r))
            if images:  # one row stands for none
                shapes["image_features"].append((s if shapes["image_features"] else 1, text.hidden_size))
            for layer in range(text.num_layers):
                names = CacheNames.of(layer)
                for tensor in (names.past_key, names.past_value):
                    shapes[tensor].append((b, *cache))
        made.append(Profile(name, {tensor: tuple(of) for tensor, of in shapes.items()}))
    return made


def vision_profiles(config: VisionConfig) -> list[Profile]:
    """The profiles of the vision encoder."""
    image = (3, config.image_size, config.image_size)
    return [Profile(name, {"pixels": tuple((count, *image) for count in bounds)}) for name, *bounds in IMAGES]


@dataclass(frozen=True)
class PlanWriter:
    """Builds the plans of one precision, with a `PlanBuilder`, each into a stage's folder and an index beside them.

    All methods raise ``BuildError`` where TensorRT refuses, and ``OSError`` where the disk is full.
    """

    builder: PlanBuilder
    precision: PrecisionName

    def decoder(self, text: TextConfig, folder: Path, progress: Callable[[str], None] | None = None) -> PlanIndex:
        """The decoder cut at attention. No weight is read: they are the plans' inputs.

        ``progress`` is told the name of every plan when its build begins.
        """
        plans = []
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            graphs = write_pieces(text, self.precision, Path(scratch))
            for piece in PIECES:
                if progress is not None:
                    progress(piece)
                plans.append(self.builder.build(graphs[piece], folder / plan_file(piece), piece_profiles(text, piece)))
        return self._index(folder, *plans)

    def single(self, text: TextConfig, folder: Path, *, capacity: int, images: bool) -> PlanIndex:
        """The whole decoder with stock attention, for comparisons; ``capacity`` as in `write_single`."""
        profiles = single_profiles(text, capacity, images=images)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            graph = write_single(text, self.precision, Path(scratch), capacity=capacity, images=images)
            return self._index(folder, self.builder.build(graph, folder / plan_file(SINGLE), profiles))

    def vision(self, checkpoint: Checkpoint, folder: Path) -> PlanIndex:
        """The vision encoder with its weights, which lie in ``folder`` a second time while it is built.

        Raises:
            BuildError: also a text-only checkpoint, or one that cannot be read.
        """
        profiles = vision_profiles(vision_config(checkpoint))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            graph = write_vision_graph(checkpoint, self.precision, Path(scratch))
            return self._index(folder, self.builder.build(graph, folder / plan_file(VISION), profiles))

    def _index(self, folder: Path, *plans: Plan) -> PlanIndex:
        index = PlanIndex(
            format=FORMAT,
            module=self.builder.module,
            version=self.builder.version,
            compute_capabilities=self.builder.capabilities,
            ranks=1,
            plans={plan.name: plan for plan in plans},
        )
        index.write(folder)
        return index
