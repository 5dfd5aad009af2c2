"""A build opens with the runtime it was made for, or says what is missing."""

from __future__ import annotations

import pytest
import torch

from builders.build import Options, build
from builders.quantize import Precision
from python_backends.config import Config
from python_backends.decoder.open import open_engine
from python_backends.errors import ArtifactError
from python_backends.manifest import TENSORRT_RTX
from tests.builders.checkpoint_files import complete


def test_a_build_for_gpus_says_what_is_missing_where_there_is_none(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    folder = tmp_path / "model_repository"
    built = build(
        complete(tmp_path / "checkpoint", "1b"), folder, Options(Precision("bf16"), TENSORRT_RTX, plans=False)
    )
    with pytest.raises(ArtifactError, match=r"pip install 'wicore\[tensorrt-rtx\]'|no NVIDIA driver was found"):
        open_engine(built.manifest, Config())
