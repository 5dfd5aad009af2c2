"""Published shapes with random weights that exist on the device alone: what a step costs does not depend on their values."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from builders.random_checkpoint import shape_config
from python_backends.manifest import ModelShape


def published(shape: str, layers: int | None = None) -> ModelShape:
    """The sizes of a published model, or of its first layers."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape_config(shape, layers)))
