"""The TensorRT plans of a GPU build: which graphs, for which shapes, and the index that describes them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from builders.graph.pieces import write_pieces
from builders.model_config import TextConfig
from builders.plan import PlanBuilder
from builders.quantize import PrecisionName
from python_backends.runtime.gpu.plans import FIRST, FORMAT, PIECES, Plan, PlanIndex, Profile

MAX_TOKENS = 4096
"""Most tokens of a step that plans take."""
TOKENS = (
    ("decode-8", 1, 8, 8),  # one row costs what eight do: the fastest read of a weight is that for eight rows
    ("decode-16", 9, 16, 16),
    ("verify", 17, 64, 128),  # drafts of several sequences
    ("prefill", 129, 2048, MAX_TOKENS),
)
"""Profiles over the tokens of a step: name, fewest, most frequent, most."""


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


def write_decoder_plans(
    text: TextConfig,
    precision: PrecisionName,
    folder: Path,
    builder: PlanBuilder,
    progress: Callable[[str], None] | None = None,
) -> PlanIndex:
    """Build the plans of the decoder cut at attention into ``folder``, and their index.

    ``progress`` is told the name of every plan when its build begins. No weight is read: they are the plans' inputs.

    Raises:
        BuildError: TensorRT refuses.
        OSError: the disk is full.
    """
    plans = []
    with tempfile.TemporaryDirectory() as scratch:
        graphs = write_pieces(text, precision, Path(scratch))
        for piece in PIECES:
            if progress is not None:
                progress(piece)
            plans.append(builder.build(graphs[piece], folder / plan_file(piece), piece_profiles(text, piece)))
    return write_index(folder, builder, plans)


def write_index(folder: Path, builder: PlanBuilder, plans: Sequence[Plan]) -> PlanIndex:
    """Describe the plans in ``folder``."""
    index = PlanIndex(
        format=FORMAT,
        module=builder.module,
        version=builder.version,
        compute_capabilities=builder.capabilities,
        ranks=1,
        plans={plan.name: plan for plan in plans},
    )
    index.write(folder)
    return index
