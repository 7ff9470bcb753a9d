"""VisiPruner's work with its findings fixed, for benchmarks on random weights, which fuse nowhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latefusion.models.policies.base import AttentionCall, Prompt, Selection
from latefusion.models.policies.visipruner.decision import VisiPrunerDecision
from latefusion.models.policies.visipruner.settings import VisiPruner


@dataclass(frozen=True, kw_only=True)
class Triggered(VisiPruner):
    """VisiPruner at full work, whose findings are replaced: it fuses, keeps and leaves as fixed.

    Args:
        fusion, kept, leave: layer, number of tokens, and first layer without vision tokens.
    """

    fusion: int
    kept: int
    leave: int

    def begin(self, prompt: Prompt) -> VisiPrunerDecision:
        return _TriggeredDecision(self, prompt)


class _TriggeredDecision(VisiPrunerDecision):
    def judge(self, layer: int, cosine: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fixed: Any = self.rules
        critical, fuses, used = super().judge(layer, cosine, norm)
        best = norm.masked_fill(~self.prunable, -1).topk(fixed.kept, dim=1).indices  # [B, kept]
        critical = torch.zeros_like(critical).scatter(1, best, True)
        uses = layer < fixed.leave - fixed.exit_patience
        return critical, torch.full_like(fuses, layer == fixed.fusion), torch.full_like(used, uses)


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Keep as many tokens as `Triggered`, but the first ones, without looking at any layer."""

    fusion: int
    kept: int
    leave: int

    def validate(self, num_layers: int) -> None:
        """Fits the decoder it was made for."""

    def begin(self, prompt: Prompt) -> _FixedDecision:
        return _FixedDecision(self, prompt)


class _FixedDecision:
    watch: frozenset[int] = frozenset()
    fusion_layer = None

    def __init__(self, fixed: Fixed, prompt: Prompt):
        self.fixed, self.vision = fixed, prompt.vision

    def select(self, layer: int) -> Selection | None:
        fixed, batch = self.fixed, len(self.vision)
        if layer == fixed.fusion + 1:
            first = self.vision & (self.vision.cumsum(1) <= fixed.kept)
            return Selection(first, (fixed.kept,) * batch)
        if layer == fixed.leave:
            return Selection(torch.zeros_like(self.vision), (0,) * batch)
        return None

    def attended(self, layer: int, call: AttentionCall) -> Tensor | None:
        raise AssertionError("watches nothing")
