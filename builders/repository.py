"""The model repository on disk: literal files, one folder per stage and build, a lock, and the manifest as commit."""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import os
import re
import secrets
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from python_backends import contract
from python_backends.errors import ArtifactError, BuildError
from python_backends.manifest import MANIFEST_NAME, TENSORRT, File, Manifest, Stage, edges_sha256, file_sha256, read
from python_backends.runtime.gpu.plans import VISION

LOCK_NAME = ".lock"
TRITON_PLAN = "model.plan"
CHECKOUT = Path(__file__).resolve().parents[1] / "model_repository"
INSTALLED = Path(sysconfig.get_path("data")) / "share" / "wicore" / "model_repository"
TRACKED = CHECKOUT if CHECKOUT.is_dir() else INSTALLED
"""The project's own repository of literal config.pbtxt and model.py files; a wheel brings a copy."""

_VERSION = "1"  # the folder of the one version Triton serves
_BUILD_ID = re.compile(r"[0-9a-f]{12}-[0-9a-f]{8}")


@contextlib.contextmanager
def locked(repository: Path) -> Iterator[None]:
    """Hold the repository's lock; it goes with the process, however that ends.

    Raises:
        BuildError: another build holds it, or the folder cannot be written.
    """
    try:
        repository.mkdir(parents=True, exist_ok=True)
        file = (repository / LOCK_NAME).open("a+", encoding="ascii")
    except OSError as error:
        raise BuildError(f"{repository} cannot be written: {error.strerror}; choose another --repository") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise BuildError(
                f"another build (process {holder}) is writing {repository}; wait for it or choose another --repository"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def add_literal_files(repository: Path) -> list[str]:
    """Copy the config.pbtxt and model.py files that the repository lacks from the project's own; never overwrite one.

    Returns the paths of those that are there and differ: edited by somebody, or copied by another version.

    Raises:
        BuildError: files are lacking and the project's are not there to copy.
    """
    if repository.resolve() == TRACKED:
        return []
    differing = []
    for model in contract.MODELS:
        source = TRACKED / model
        if not (source / "config.pbtxt").is_file():
            if (repository / model / "config.pbtxt").is_file():
                continue
            raise BuildError(
                f"{repository / model} has no config.pbtxt and {source} has none to copy; "
                "install WiCore again, or copy a checkout's model_repository first"
            )
        for path in sorted(source.rglob("*")):
            inner = path.relative_to(source)
            target = repository / model / inner
            outputs = any(part == "__pycache__" or _BUILD_ID.fullmatch(part) for part in inner.parts)
            if not path.is_file() or outputs:
                continue
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            elif not filecmp.cmp(path, target, shallow=False):
                differing.append(target.relative_to(repository).as_posix())
    return differing


def link_vision_plan(manifest: Manifest) -> None:
    """Lay ``vision_encoder/1/model.plan``, where Triton's TensorRT backend looks, at the build's plan, or take it away.

    Plans of TensorRT-RTX are none that this backend reads.
    """
    link = manifest.repository / contract.VISION_ENCODER / _VERSION / TRITON_PLAN
    stage = manifest.stages.get(contract.VISION_ENCODER)
    name = f"{VISION}.plan"
    if manifest.runtime != TENSORRT or stage is None or name not in {file.name for file in stage.files}:
        link.unlink(missing_ok=True)
        return
    draft = link.with_name(f"{TRITON_PLAN}.{manifest.build_id}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(Path(Path(stage.folder).name) / name)
    draft.replace(link)


def new_build_id(identity: str) -> str:
    """A name for one attempt to build: never used before, so that nothing of an earlier build is touched."""
    return f"{identity[:12]}-{secrets.token_hex(4)}"


def stage_folder(repository: Path, stage: str, build_id: str) -> Path:
    """Create the folder that one build may fill for one stage."""
    folder = repository / stage / _VERSION / build_id
    folder.mkdir(parents=True)
    return folder


def describe_stages(repository: Path, build_id: str) -> dict[str, Stage]:
    """Flush and hash every file of a build."""
    stages = {}
    for stage in contract.STAGES:
        folder = repository / stage / _VERSION / build_id
        if folder.is_dir():
            files = tuple(_describe(path) for path in sorted(folder.iterdir()))
            _sync(folder)
            _sync(folder.parent)
            stages[stage] = Stage(folder.relative_to(repository).as_posix(), files)
    return stages


def _describe(path: Path) -> File:
    _sync(path)
    return File(path.name, path.stat().st_size, file_sha256(path), edges_sha256(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(manifest: Manifest) -> None:
    """Make the build the repository's model: replace the manifest in one step that survives a power cut."""
    path = manifest.repository / MANIFEST_NAME
    draft = path.with_name(f"{MANIFEST_NAME}.{manifest.build_id}")
    try:
        draft.write_text(manifest.to_json(), encoding="utf-8")
        _sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    _sync(manifest.repository)


def discard(repository: Path, build_id: str) -> None:
    """Remove what a build that failed has written."""
    for stage in contract.STAGES:
        shutil.rmtree(repository / stage / _VERSION / build_id, ignore_errors=True)


def sweep(repository: Path) -> None:
    """Remove folders and drafts of builds that the manifest does not name: older ones, and ones that were killed.

    Nothing is removed while the manifest cannot be understood: it may be of a newer WiCore.
    """
    current = None
    if (repository / MANIFEST_NAME).exists():
        try:
            current = read(repository).build_id
        except ArtifactError:
            return
    for stage in contract.STAGES:
        for folder in repository.glob(f"{stage}/{_VERSION}/*/"):
            if _BUILD_ID.fullmatch(folder.name) and folder.name != current:
                shutil.rmtree(folder, ignore_errors=True)
    for draft in repository.glob(f"{MANIFEST_NAME}.*"):
        draft.unlink(missing_ok=True)
