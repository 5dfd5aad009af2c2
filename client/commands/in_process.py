"""The built model answering without Triton, on prompts and pixels that transformers' own processor prepares."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from builders.demo.evaluate import Request as Asked
    from python_backends.config import Config
    from python_backends.decoder.engine import Engine
    from python_backends.decoder.sequence import Piece
    from python_backends.manifest import Manifest


@contextmanager
def in_process_answerer(
    repository: Path, checkpoint: Path, open_engine: Callable[[Manifest, Config], Engine] | None = None
) -> Iterator[Callable[[Sequence[Asked]], list[str]]]:
    """As `builders.demo.evaluate` takes it: many conversations at a time, decoded together.

    ``open_engine``: `decoder.open.open_engine` where None.

    Raises:
        ArtifactError: the repository is not built.
    """
    from transformers import AutoProcessor

    from builders.demo.evaluate import MAX_NEW_TOKENS
    from python_backends import config, contract, manifest
    from python_backends.decoder.open import open_engine as open_default
    from python_backends.decoder.parameters import parameters_within
    from python_backends.decoder.sequence import Request
    from python_backends.runtime.onnxruntime import OnnxRuntimeVision

    settings = config.load(repository)
    built = manifest.load(repository)
    processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
    vision = OnnxRuntimeVision(built.folder(contract.VISION_ENCODER))
    engine = (open_engine or open_default)(built, settings)

    def submit(asked: Asked) -> tuple[threading.Event, list[Piece]]:
        ids, starts, pixels = prepare(processor, asked, built.model.image)
        features = np.concatenate(vision.encode(pixels)) if len(pixels) else None
        done, pieces = threading.Event(), []

        def sink(piece: Piece) -> None:
            pieces.append(piece)
            if piece.finish_reason:
                done.set()

        parameters = parameters_within(settings, max_tokens=MAX_NEW_TOKENS, temperature=0.0)
        engine.submit(Request(ids, parameters, sink, image_starts=starts, image_features=features))
        return done, pieces

    def answer(requests: Sequence[Asked]) -> list[str]:
        waiting = [submit(asked) for asked in requests]
        for done, _ in waiting:
            done.wait()
        return ["".join(piece.text for piece in pieces) for _, pieces in waiting]

    try:
        yield answer
    finally:
        engine.close()
        vision.close()


def prepare(processor: Any, asked: Asked, image: Any) -> tuple[list[int], list[int], np.ndarray[Any, Any]]:
    """Token ids, the first soft token of each picture, and uint8 pixels [n, 3, H, W] of one conversation."""
    messages, images = asked
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=images or None, add_special_tokens=False, do_rescale=False, do_normalize=False)
    ids = list(np.asarray(inputs["input_ids"]).reshape(-1))
    soft = np.flatnonzero(np.asarray(ids) == image.image_token_id) if images else np.zeros(0, np.int64)
    pixels = np.asarray(inputs["pixel_values"]).astype(np.uint8) if images else np.zeros((0, 3, 1, 1), np.uint8)
    return [int(token) for token in ids], soft[:: image.tokens_per_image].tolist(), pixels
