"""Two names of a checkpoint: its fingerprint, over every weight, and its identity, which tells at once of a change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from builders.checkpoint import Checkpoint, weight_files
from builders.tensors import read_exactly, read_header
from python_backends.errors import BuildError
from python_backends.manifest import file_sha256

CONTENT_LIMIT = 64 * 2**20
"""Files up to this size are identified by their content; larger ones by size, time of change and tensor headers."""
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)
"""Files beside the weights that a build uses or hands on."""
_CHUNK = 8 * 2**20


def source_identity(folder: Path, options: dict[str, Any]) -> str:
    """A hash that changes when the checkpoint, the options or the builders' own code change; no weight is read.

    Raises:
        BuildError: no weights, or files that cannot be read.
    """
    sides = [folder / name for name in SIDE_FILES if (folder / name).is_file()]
    description = {
        "options": options,
        "builder": builder_digest(),
        "files": [_file_identity(path) for path in (*sides, *weight_files(folder))],
    }
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _file_identity(path: Path) -> list[str | int]:
    try:
        status = path.stat()
        if status.st_size <= CONTENT_LIMIT:
            return [path.name, status.st_size, file_sha256(path)]
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from error
    return [path.name, status.st_size, status.st_mtime_ns, *([read_header(path)[2]] if path.suffix != ".json" else [])]


def builder_digest() -> str:
    """A hash of the code that turns checkpoints into artefacts, so that a changed builder rebuilds."""
    root = Path(__file__).parent
    modules = [path for path in root.glob("*.py") if path.name not in {"cli.py", "hub.py"}]
    sources = [*modules, *root.glob("graph/**/*.py"), root.parent / "python_backends" / "manifest.py"]
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


class Fingerprint:
    """Hashes configuration and weights on a thread of its own while the build reads the same files.

    The hash covers names, element types, shapes and bytes in canonical order, so that the same weights in other
    shards or under other prefixes are the same model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Start hashing."""
        self._checkpoint = checkpoint
        self._stop = threading.Event()
        self._result = ""
        self._error: BuildError | None = None
        self._thread = threading.Thread(target=self._run, name="fingerprint", daemon=True)
        self._thread.start()

    def result(self) -> str:
        """Wait for the hash, in hexadecimal.

        Raises:
            BuildError: a file could not be read to the end.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def cancel(self) -> None:
        """Stop soon and wait for that."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self._checkpoint.config), sort_keys=True).encode())
        buffer = memoryview(bytearray(_CHUNK))
        try:
            for name, tensor in sorted(self._checkpoint.tensors.items()):
                digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
                for start in range(0, tensor.num_bytes, _CHUNK):
                    if self._stop.is_set():
                        return
                    piece = buffer[: min(_CHUNK, tensor.num_bytes - start)]
                    read_exactly(tensor.path, piece, tensor.offset + start)
                    digest.update(piece)
        except BuildError as error:
            self._error = error
        self._result = digest.hexdigest()
