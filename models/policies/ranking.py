"""What the training-free relatives share: how many tokens a ratio keeps, and the best of them by a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latefusion.models.policies.base import AttentionCall, Prompt, Selection


def share(n_vision: Sequence[int], ratio: float) -> tuple[int, ...]:
    """How many of each sample's vision tokens stay: the rounded share, at least one of any."""
    return tuple(min(n, max(1, round(n * ratio))) for n in n_vision)


def best(scores: Tensor, among: Tensor, counts: Sequence[int]) -> Tensor:
    """Each sample's `counts` highest-scored of the tokens `among`, ties to the earlier one; no host sync.

    Args:
        scores: `[B, T]`.
        among: bool `[B, T]`, at least `counts[b]` of them in row b.

    Returns:
        bool `[B, T]`.
    """
    order = torch.where(among, scores, float("-inf")).argsort(dim=1, descending=True, stable=True)  # [B, T]
    most = max(counts)
    first: Any = True
    if min(counts) < most:
        # [B, most]
        first = torch.arange(most, device=order.device) < on_device(counts, order.device)[:, None]
    return torch.zeros_like(among).scatter_(1, order[:, :most], first)


def on_device(numbers: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """A tensor of these numbers `[B]`, or one made on the host, where `device` is; the host does not wait."""
    made = torch.as_tensor(numbers)
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)


class AttentionRanking:
    """One prefill in which, from each layer of `keep_ratios` on, a share of the vision tokens stays.

    They are ranked by the attention that the last prompt token pays them in the layer before, mean over heads
    (with several queries: the most that any of them pays).
    """

    fusion_layer = None

    def __init__(self, keep_ratios: Mapping[int, float], prompt: Prompt):
        self.keep_ratios, self.prompt = keep_ratios, prompt
        self.watch = {layer - 1 for layer in keep_ratios}
        self.kept = prompt.vision  # bool [B, T]
        self.scores: Tensor | None = None  # float32 [B, T]

    def select(self, layer: int) -> Selection | None:
        if layer not in self.keep_ratios:
            return None
        assert self.scores is not None, "the layer before was not watched"
        counts = share(self.prompt.n_vision, self.keep_ratios[layer])
        self.kept = best(self.scores, self.kept, counts)
        return Selection(self.kept, counts)

    @torch.no_grad()
    def attended(self, layer: int, call: AttentionCall) -> None:
        queries = self.prompt.queries
        weights = call.weights(call.compact_rows(queries)).mean(1).amax(1)  # [B, K]
        scores = call.to_logical(weights, self.prompt.vision.shape[1])  # [B, T]
        self.scores = scores.scatter(1, queries, float("inf"))  # a query that is a vision token stays
