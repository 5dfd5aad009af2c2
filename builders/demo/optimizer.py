# mypy: disable-error-code="misc, untyped-decorator"
"""Muon for the matrices inside the layers, AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def orthogonalize(updates: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz: (n, rows, columns) matrices with their singular values brought near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = updates.shape[-2] > updates.shape[-1]
    x = updates.to(torch.bfloat16)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, all matrices of one shape at once; its size matches AdamW's."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            params: list[nn.Parameter] = group["params"]
            gradients = torch.stack([p.grad for p in params if p.grad is not None])
            state = self.state[params[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradients)
            momentum: torch.Tensor = state["momentum"]
            momentum.lerp_(gradients, 1 - group["momentum"])
            update = orthogonalize(gradients.lerp(momentum, group["momentum"]))
            scale = 0.2 * max(update.shape[-2:]) ** 0.5 * group["lr"]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.unbind(0)), alpha=-scale)


def build_optimizers(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers among the ``named`` parameters, AdamW for the others."""
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.ndim == 2 and ".layers." in name:
            matrices.append(parameter)
        elif parameter.ndim >= 2:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.98), eps=1e-9, fused=True,
    )  # fmt: skip
    return [Muon(matrices, lr=lr, momentum=0.95, weight_decay=weight_decay), adam]
