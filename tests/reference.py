"""transformers in float32 on the CPU: what every runtime is compared with."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

# These models are too small to share among threads, and OpenMP's threads spin: with busy neighbours on two cores the
# 27B family's parity test took 97 s instead of 10.
torch.set_num_threads(1)


class Reference:
    """A checkpoint in transformers, attention written out (``eager``)."""

    def __init__(self, folder: Path) -> None:
        kind = AutoConfig.from_pretrained(folder).model_type
        model = Gemma3ForConditionalGeneration if kind == "gemma3" else Gemma3ForCausalLM
        self.model = model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.image_token_id = getattr(self.model.config, "image_token_id", None)

    def logits(self, ids: NDArray[np.int32], pixels: NDArray[np.uint8] | None = None) -> NDArray[np.float32]:
        """[S] ids and [N, 3, H, W] pixels → logits [S, V] of the whole sequence in one forward pass."""
        with torch.no_grad():
            return self.model(**self._inputs(ids, pixels)).logits[0].numpy()

    def greedy(self, ids: NDArray[np.int32], pixels: NDArray[np.uint8] | None, count: int) -> list[int]:
        """``count`` greedy tokens from transformers' own generate, whatever ends a sequence."""
        with torch.no_grad():
            out = self.model.generate(
                **self._inputs(ids, pixels),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
            )
        return out[0, len(ids) :].tolist()

    def image_features(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[N, 3, H, W] uint8 → [N, tokens_per_image, D]."""
        with torch.no_grad():
            return self.model.model.get_image_features(normalized(pixels)).pooler_output.numpy()

    def _inputs(self, ids: NDArray[np.int32], pixels: NDArray[np.uint8] | None) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": torch.tensor(np.asarray(ids), dtype=torch.long)[None]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if self.image_token_id is not None:
            # Without it transformers masks causally, text alone included: then both are the same.
            inputs["token_type_ids"] = (inputs["input_ids"] == self.image_token_id).long()
        if pixels is not None and len(pixels):
            inputs["pixel_values"] = normalized(pixels)
        return inputs


def normalized(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """What the image processor's NumPy backend makes of uint8 pixels."""
    rescaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    return torch.from_numpy((rescaled - np.float32(0.5)) / np.float32(0.5))


@functools.cache
def reference(folder: Path) -> Reference:
    """The reference of a checkpoint, loaded once per process."""
    return Reference(folder)
