"""Vision tokens at random: what a ranking has to beat."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from latefusion.models.policies.base import AttentionCall, Prompt, Selection
from latefusion.models.policies.checks import check_layer, check_ratio, number, settle, whole_number
from latefusion.models.policies.ranking import on_device, share


@dataclass(frozen=True, kw_only=True)
class Random:
    """From `layer` on, a random share of the vision tokens stays.

    Which ones is a function of the seed and the prompt's numbers of vision and text tokens: the same on every machine,
    in every batch, and for every policy object. A prompt that comes in chunks is drawn from chunk by chunk.

    Args:
        layer: first layer that computes fewer; 0: they never enter the decoder.
        keep_ratio: share of the vision tokens that stays.
        seed: of the choice.

    Raises:
        ValueError: a value is out of its range.
    """

    layer: int = 0
    keep_ratio: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, whole_number, "layer", "seed")
        settle(self, number, "keep_ratio")
        if self.layer < 0:
            raise ValueError(f"layer={self.layer} must not be negative; layers count from 0.")
        check_ratio("keep_ratio", self.keep_ratio)

    def validate(self, num_layers: int) -> None:
        check_layer("layer", self.layer, num_layers)

    def begin(self, prompt: Prompt) -> _RandomDecision:
        return _RandomDecision(self, prompt)


class _RandomDecision:
    watch: frozenset[int] = frozenset()
    fusion_layer = None

    def __init__(self, policy: Random, prompt: Prompt):
        self.policy, self.prompt = policy, prompt

    def select(self, layer: int) -> Selection | None:
        policy, prompt = self.policy, self.prompt
        if layer != policy.layer:
            return None
        counts = share(prompt.n_vision, policy.keep_ratio)
        # [B, V], by order in the prompt
        stays = torch.zeros(len(counts), max(prompt.n_vision), dtype=torch.bool)
        for b, (n, k) in enumerate(zip(prompt.n_vision, counts, strict=True)):
            n_text = prompt.n_real[b] - n - prompt.n_answer[b]
            stays[b, random.Random(f"{policy.seed}/{n}/{n_text}").sample(range(n), k)] = True
        rank = (prompt.vision.cumsum(1) - 1).clamp(min=0)  # [B, T]
        return Selection(prompt.vision & on_device(stays, rank.device).gather(1, rank), counts)

    def attended(self, layer: int, call: AttentionCall) -> Tensor | None:
        raise AssertionError("watches nothing")
