"""From a built repository to a running engine, with or without Triton around it."""

from __future__ import annotations

from tokenizers import Tokenizer

from python_backends import contract
from python_backends.config import Config
from python_backends.decoder.engine import Engine
from python_backends.errors import ArtifactError
from python_backends.manifest import Manifest
from python_backends.runtime.onnxruntime import OnnxRuntimeDecoder


def open_tokenizer(manifest: Manifest) -> Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
        ArtifactError: it cannot be read.
    """
    path = manifest.folder(contract.TOKENIZER) / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ArtifactError(f"{path} is not a tokenizer ({error}); rebuild with `wicore build --force`") from error
