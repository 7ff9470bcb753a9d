"""Muon for the matrices of the layers (with weight decay), Adam for the rest; float32 masters.

Muon (Jordan et al., 2024): momentum, then five Newton-Schulz iterations towards the nearest orthogonal
matrix, scaled by 0.2 sqrt(max(rows, columns)) to match Adam's step (Liu et al., 2025). Matrices of one
shape are stacked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, *, steps: int = 5) -> Tensor:
    """[N, rows, columns] -> the same shape, float32, singular values near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    if tall := x.size(-2) > x.size(-1):
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class MuonAdam:
    """An optimizer with Muon for the matrices of the layers and Adam for the rest."""

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float = 0.02
    ) -> None:
        self.lr, self.weight_decay, self.steps = lr, weight_decay, 0
        self.matrices: dict[tuple[int, ...], list[nn.Parameter]] = {}
        self.others: list[nn.Parameter] = []
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            if parameter.dim() == 2 and "layers" in name:
                self.matrices.setdefault(tuple(parameter.shape), []).append(parameter)
            else:
                self.others.append(parameter)
        self.parameters = [*(p for group in self.matrices.values() for p in group), *self.others]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.momenta = [torch.zeros(len(group), *shape) for shape, group in self.matrices.items()]
        self.moments = [torch.zeros(2, *p.shape) for p in self.others]

    @torch.no_grad()
    def step(self, factor: float) -> float:
        """One step at `factor` times the peak rate, gradients clipped to norm 1 and then dropped; returns
        their norm.
        """
        self.steps += 1
        lr = self.lr * factor
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        norm = torch.sqrt(sum(((g.float() ** 2).sum() for g in gradients), start=torch.zeros(())))
        clip = min(1.0, 1.0 / max(float(norm), 1e-12))

        at = 0
        for momentum in self.momenta:
            here = slice(at, at := at + len(momentum))
            gradient = torch.stack([g.float() for g in gradients[here]]) * clip
            momentum.lerp_(gradient, 0.05)
            shape = momentum.shape[1:]
            updates = orthogonalise(gradient.lerp(momentum, 0.95)) * (0.2 * max(shape) ** 0.5)
            for master, update in zip(self.masters[here], updates, strict=True):
                master.mul_(1 - lr * self.weight_decay).add_(update, alpha=-lr)
        for moment, master, raw in zip(self.moments, self.masters[at:], gradients[at:], strict=True):
            gradient = raw.float() * clip
            moment[0].lerp_(gradient, 0.1)
            moment[1].lerp_(gradient * gradient, 0.02)
            mean = moment[0] / (1 - 0.9**self.steps)
            deviation = (moment[1] / (1 - 0.98**self.steps)).sqrt() + 1e-8
            master.addcdiv_(mean, deviation, value=-lr)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)
            parameter.grad = None
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "masters": self.masters,
            "momenta": self.momenta,
            "moments": self.moments,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for name in ("masters", "momenta", "moments"):
            for tensor, saved in zip(getattr(self, name), state[name], strict=True):
                tensor.copy_(saved)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)
