"""What `wicore build` left in a model repository, read and checked by everything that loads it.

``manifest.json`` is the commit point: the builder writes every file of a build into folders of its own
(``<stage>/1/<build id>/``) and replaces the manifest last, atomically. Whatever the manifest names is complete;
whatever it does not name does not exist for a server.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from python_backends.errors import ArtifactError

ONNXRUNTIME, TENSORRT, TENSORRT_RTX = "onnxruntime", "tensorrt", "tensorrt-rtx"
"""What `Manifest.runtime` may be; the latter two are for GPUs."""
MANIFEST_NAME = "manifest.json"
FORMAT = 1
"""Raised whenever artefacts or manifest change so that an older server could misread them."""

FULL_HASH_LIMIT = 512 * 2**20
"""Files up to this size are hashed whole when they are checked; of larger ones the size and both ends."""
EDGE = 2**20
"""Bytes hashed at each end of a large file."""


@dataclass(frozen=True)
class File:
    """One file of a stage."""

    name: str
    size: int
    sha256: str
    """Of the whole file."""
    edges_sha256: str
    """Of the first and the last MiB."""


@dataclass(frozen=True)
class Stage:
    """The build output of one model of the ensemble."""

    folder: str
    """Relative to the repository, with forward slashes."""
    files: tuple[File, ...]


@dataclass(frozen=True)
class ImageShape:
    """How images enter a multimodal model."""

    image_size: int
    """Height and width of the pixels (px)."""
    tokens_per_image: int
    image_token_id: int
    """Placeholder that an image embedding replaces."""
    boi_token_id: int
    eoi_token_id: int


@dataclass(frozen=True)
class ModelShape:
    """The sizes that a runtime, the engine and the stages need."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int
    layer_types: tuple[str, ...]
    """Per layer, "local" or "global"."""
    max_context_length: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int
    pad_token_id: int
    image: ImageShape | None
    """None in a text-only model."""


@dataclass(frozen=True)
class Manifest:
    """A complete build."""

    format: int
    build_id: str
    fingerprint: str
    """sha256 over configuration and weights: which model this is, whatever it was built into."""
    source: str
    """Identity of checkpoint, options and builder that made it; equal identities need no rebuild."""
    name: str
    """The checkpoint's name, for people."""
    precision: str
    block_size: int
    symmetric: bool
    runtime: str
    ranks: int
    """GPUs that share one decoder."""
    versions: dict[str, str]
    model: ModelShape
    stages: dict[str, Stage]
    repository: Path = field(default=Path(), metadata={"stored": False})

    def folder(self, stage: str) -> Path:
        """The folder of a stage's files.

        Raises:
            ArtifactError: the build has none, as a text-only model has no vision encoder.
        """
        if stage not in self.stages:
            raise ArtifactError(f"{self.repository} holds no files for {stage}; {_rebuild(self.repository)}")
        return self.repository / self.stages[stage].folder

    def verify(self, stages: Iterable[str] | None = None) -> None:
        """Check the files of ``stages`` (all by default) against their hashes; see `FULL_HASH_LIMIT`.

        Raises:
            ArtifactError: a file is missing, unreadable, or not what was built.
        """
        for stage in self.stages if stages is None else stages:
            folder = self.folder(stage)
            for file in self.stages[stage].files:
                path = folder / file.name
                whole = file.size <= FULL_HASH_LIMIT
                try:
                    found = file_sha256(path) if whole else edges_sha256(path)
                except OSError as error:
                    raise ArtifactError(
                        f"{path} cannot be read: {error.strerror}; {_rebuild(self.repository)}"
                    ) from error
                if found != (file.sha256 if whole else file.edges_sha256):
                    raise ArtifactError(f"{path} is corrupt (its hash differs); {_rebuild(self.repository)}")

    def to_json(self) -> str:
        """The content of manifest.json."""
        values = dataclasses.asdict(self)
        del values["repository"]
        return json.dumps(values, indent=2) + "\n"


def load(repository: Path, stages: Iterable[str] | None = None) -> Manifest:
    """Read and check the manifest: sizes of every file, hashes of the files of ``stages`` (all by default).

    A stage that loads names itself, so that the others' files are not hashed again in every process.

    Raises:
        ArtifactError: nothing built, a manifest that is corrupt or of another version, or files that are missing or
            differ; the message names the file and the command that mends it.
    """
    manifest = read(repository)
    for stage in manifest.stages.values():
        for file in stage.files:
            path = repository / stage.folder / file.name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise ArtifactError(f"{path} is missing; {_rebuild(repository)}") from error
            if size != file.size:
                raise ArtifactError(f"{path} has {size} bytes instead of {file.size}; {_rebuild(repository)}")
    manifest.verify(None if stages is None else [stage for stage in stages if stage in manifest.stages])
    return manifest


def read(repository: Path) -> Manifest:
    """Parse the manifest without looking at the files it names.

    Raises:
        ArtifactError: as `load`, for the manifest itself.
    """
    path = repository / MANIFEST_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{repository} holds no built model; {_rebuild(repository)}") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; {_rebuild(repository)}") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise ArtifactError(f"{path} has format {found!r}, this WiCore reads {FORMAT}; {_rebuild(repository)}")
    try:
        manifest = decode(Manifest, values)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is corrupt ({error}); {_rebuild(repository)}") from error
    for stage in manifest.stages.values():
        inside = [stage.folder, *(file.name for file in stage.files)]
        if any(Path(part).is_absolute() or ".." in Path(part).parts or "\0" in part for part in inside):
            raise ArtifactError(f"{path} names files outside the repository; {_rebuild(repository)}")
    complete: Manifest = dataclasses.replace(manifest, repository=repository)
    return complete


def _rebuild(repository: Path) -> str:
    return f"run `wicore build CHECKPOINT --repository {repository}`"


def decode(kind: Any, value: Any) -> Any:
    """``value`` from JSON as the annotated type; refuses what does not fit."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        stored = [entry.name for entry in dataclasses.fields(kind) if entry.metadata.get("stored", True)]
        if not isinstance(value, Mapping):
            raise TypeError(f"{kind.__name__} is {value!r}")
        return kind(**{name: decode(hints[name], value[name]) for name in stored})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(decode(arguments[0], item) for item in _expect(list, value))
    if origin is dict:
        return {_expect(str, key): decode(arguments[1], item) for key, item in _expect(dict, value).items()}
    if origin is types.UnionType:
        return None if value is None else decode(arguments[0], value)
    return _expect(kind, value)


def _expect(kind: type, value: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def file_sha256(path: Path) -> str:
    """sha256 of a whole file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def edges_sha256(path: Path) -> str:
    """sha256 of the first and the last MiB of a file, which may overlap."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(EDGE))
        file.seek(max(0, file.seek(0, os.SEEK_END) - EDGE))
        digest.update(file.read(EDGE))
    return digest.hexdigest()
