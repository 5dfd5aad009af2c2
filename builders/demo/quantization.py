"""Fake weight quantization for training: what block-32 int4 and int8 weights would hold, back in float."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

BLOCK = 32
MODES = ("int4", "int4-asymmetric", "int8")


def fake_quantize(blocks: torch.Tensor, mode: str) -> torch.Tensor:
    """(n, 32) weights rounded to ``mode``, one scale a block, as ONNX Runtime's MatMulNBits stores them."""
    if mode == "int8":
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-10)
        return (blocks / scale).round().clamp(-127, 127) * scale
    if mode == "int4-asymmetric":
        low = blocks.amin(-1, keepdim=True).clamp_max(0)
        scale = ((blocks.amax(-1, keepdim=True).clamp_min(0) - low) / 15).clamp_min(1e-10)
        zero = (-low / scale).round()
        return ((blocks / scale).round() + zero).clamp(0, 15).sub(zero) * scale
    # The value of largest magnitude keeps its sign and maps to −8.
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = extreme / -8
    scale = torch.where(scale.abs() < 1e-10, torch.full_like(scale, 1e-10), scale)
    return (blocks / scale).round().clamp(-8, 7) * scale


class WeightQuantizer:
    """All weights a weight-only quantizer would touch: linear layers, embedding (and tied head), projector, patches."""

    def __init__(self, model: nn.Module) -> None:
        self.weights: list[nn.Parameter] = []
        self.transposed: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if name.endswith("mm_input_projection_weight"):
                self.transposed.append(parameter)  # stored as (inputs, outputs)
            elif parameter.ndim >= 2 and "position_embedding" not in name:
                self.weights.append(parameter)

    def _blocks(self) -> torch.Tensor:
        parts = [weight.reshape(-1, BLOCK) for weight in self.weights]
        parts += [weight.mT.reshape(-1, BLOCK) for weight in self.transposed]
        return torch.cat(parts)

    def _write(self, blocks: torch.Tensor) -> None:
        everything = self.weights + self.transposed
        pieces = blocks.split([weight.numel() // BLOCK for weight in everything])
        shaped = [piece.view(weight.shape) for piece, weight in zip(pieces, self.weights, strict=False)]
        last = pieces[len(self.weights) :]
        shaped += [piece.view(w.mT.shape).mT for piece, w in zip(last, self.transposed, strict=True)]
        torch._foreach_copy_(everything, shaped)

    def quantize(self, mode: str) -> torch.Tensor:
        """Round the weights to ``mode`` for good; return the full ones, (n, 32)."""
        with torch.no_grad():
            full = self._blocks()
            self._write(fake_quantize(full, mode))
        return full

    @contextmanager
    def quantized(self, mode: str | None) -> Iterator[None]:
        """Inside, the weights hold their values in ``mode``; afterwards the full ones again.

        A gradient computed inside and applied outside is the straight-through estimate.
        """
        if mode is None:
            yield
            return
        full = self.quantize(mode)
        try:
            yield
        finally:
            with torch.no_grad():
                self._write(full)
