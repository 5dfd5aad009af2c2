"""What `wicore build` says about its TensorRT plans: ``plans.json`` beside them, read without TensorRT.

A plan serves the GPUs and the version of TensorRT that it was built for, and shapes inside its profiles. Sixteen-bit,
eight-bit and other element types have Triton-lang's names (`launch.DTYPES`), and "i4" for two values a byte.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from python_backends.errors import ArtifactError
from python_backends.manifest import decode

INDEX_FILE = "plans.json"
FORMAT = 1
FIRST: Final = "first"
BETWEEN: Final = "between"
LAST: Final = "last"
PIECES: Final = (FIRST, BETWEEN, LAST)
SINGLE: Final = "single"
VISION: Final = "vision_encoder"
"""Names of plans: pieces of the decoder cut at attention, the whole decoder with stock attention, the vision tower."""

SIGNED_INT4: Final = 0x88
"""Bytes of four-bit weights in the weight file XOR this are the signed ones that plans take."""

Shape = tuple[int, ...]

_REBUILD = "run `wicore build` again with the same options"


@dataclass(frozen=True)
class Profile:
    """A range of shapes that a plan has kernels for."""

    name: str
    shapes: dict[str, tuple[Shape, ...]]
    """Of every input with a dynamic dimension: smallest, most frequent, largest."""


@dataclass(frozen=True)
class PlanTensor:
    """An input or output; −1 is a dynamic dimension."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Plan:
    """One plan file."""

    name: str
    file: str
    onnx_sha256: str
    """Of the graph that it was built from, without the weights it refers to."""
    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    profiles: tuple[Profile, ...]
    network_layers: dict[str, int]
    """How many layers of each of TensorRT's types the graph became, KV_CACHE_UPDATE and ATTENTION among them."""
    engine_layers: dict[str, int]
    """What these were compiled to, all profiles together; fused attention counts as ``attention``."""
    num_bytes: int
    seconds: float
    """What building took."""

    def profile(self, **shapes: Sequence[int]) -> int:
        """The index of the first profile that takes inputs of these shapes.

        Raises:
            ArtifactError: none does.
        """
        for index, profile in enumerate(self.profiles):
            if all(_within(shapes[name], profile.shapes[name]) for name in shapes):
                return index
        raise ArtifactError(f"plan {self.name!r} has no profile for {shapes}; {_REBUILD}")


@dataclass(frozen=True)
class PlanIndex:
    """The plans of one folder."""

    format: int
    module: str
    """Python module that built them and loads them."""
    version: str
    """Of that module; plans of another version do not load."""
    compute_capabilities: tuple[str, ...]
    """GPUs that the plans are for, such as "8.9"; none: those that TensorRT chooses by itself."""
    ranks: int
    """GPUs that share one decoder."""
    plans: dict[str, Plan]

    def __getitem__(self, name: str) -> Plan:
        try:
            return self.plans[name]
        except KeyError:
            raise ArtifactError(f"there is no plan {name!r}; {_REBUILD}") from None

    def write(self, folder: Path) -> None:
        """Write the index beside its plans."""
        values = json.dumps(dataclasses.asdict(self), indent=1)
        (folder / INDEX_FILE).write_text(values + "\n", encoding="utf-8")


def _within(shape: Sequence[int], bounds: Sequence[Shape]) -> bool:
    low, high = bounds[0], bounds[-1]
    return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


def open_plans(folder: Path) -> PlanIndex | None:
    """The index in a stage's folder; None where the build has no plans.

    Raises:
        ArtifactError: it is corrupt or of another version, or a plan is missing.
    """
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; {_REBUILD}") from error
    found = values.get("format") if isinstance(values, Mapping) else None
    if found != FORMAT:
        raise ArtifactError(f"{path} has format {found!r}, this WiCore reads {FORMAT}; {_REBUILD}")
    try:
        index: PlanIndex = decode(PlanIndex, values)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is corrupt ({error!r}); {_REBUILD}") from error
    for plan in index.plans.values():
        file = folder / plan.file
        if not file.is_file() or file.stat().st_size != plan.num_bytes:
            raise ArtifactError(f"{file} is missing or not what was built; {_REBUILD}")
    return index
