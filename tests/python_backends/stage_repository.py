"""A model repository as far as the tokenizer and the image processor read it: no weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from python_backends import manifest
from python_backends.contract import IMAGE_PROCESSOR, TOKENIZER
from tests.paths import DEMO_CHECKPOINT

VOCAB_SIZE = 1024
_CONFIG = json.loads((DEMO_CHECKPOINT / "config.json").read_text(encoding="utf-8"))
TOKENS_PER_IMAGE: int = _CONFIG["mm_tokens_per_image"]
IMAGE_SIZE: int = _CONFIG["vision_config"]["image_size"]
CONTEXT = 8192
IMAGE = manifest.ImageShape(IMAGE_SIZE, TOKENS_PER_IMAGE, image_token_id=1023, boi_token_id=7, eoi_token_id=8)

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


def write_repository(
    folder: Path, *, image: manifest.ImageShape | None = IMAGE, settings: Mapping[str, Any] | None = None
) -> Path:
    """Fill ``folder`` from the demo checkpoint; ``settings`` go to wicore.json."""
    stages = {TOKENIZER: _stage(folder, TOKENIZER, TEXT_FILES)}
    if image:
        stages[IMAGE_PROCESSOR] = _stage(folder, IMAGE_PROCESSOR, IMAGE_FILES)
    model = manifest.ModelShape(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_layers=12,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        sliding_window=_CONFIG["text_config"]["sliding_window"],
        layer_types=("local",) * 12,
        max_context_length=CONTEXT,
        eos_token_ids=(1, 6),
        bos_token_id=2,
        pad_token_id=0,
        image=image,
    )
    built = manifest.Manifest(
        format=manifest.FORMAT,
        build_id="build",
        fingerprint="",
        source="",
        name="demo",
        precision="fp32",
        block_size=32,
        symmetric=True,
        runtime="onnxruntime",
        ranks=1,
        versions={},
        model=model,
        stages=stages,
    )
    (folder / manifest.MANIFEST_NAME).write_text(built.to_json(), encoding="utf-8")
    if settings:
        (folder / "wicore.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _stage(repository: Path, name: str, files: tuple[str, ...]) -> manifest.Stage:
    folder = repository / name / "1" / "build"
    folder.mkdir(parents=True)
    found = []
    for file in files:
        path = folder / file
        shutil.copyfile(DEMO_CHECKPOINT / file, path)
        found.append(manifest.File(file, path.stat().st_size, manifest.file_sha256(path), manifest.edges_sha256(path)))
    return manifest.Stage(f"{name}/1/build", tuple(found))
