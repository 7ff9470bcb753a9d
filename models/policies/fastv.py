"""FastV: after a few layers, half of the vision tokens goes (Chen et al., ECCV 2024, arXiv 2403.06764)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latefusion.models.layer_kinds import require_attention
from latefusion.models.policies.base import Prompt
from latefusion.models.policies.checks import check_layer, check_ratio, number, settle, whole_number
from latefusion.models.policies.ranking import AttentionRanking


@dataclass(frozen=True, kw_only=True)
class FastV:
    """From `layer` on, the vision tokens stay to which the last prompt token paid most attention in the layer before.

    The defaults are the paper's K = 2 and R = 50%. As in the official code (github.com/pkunlp-icler/FastV,
    `fastv_forward` in `src/FastV/llava-hf/.../llama/modeling_llama.py`): tokens leave before the layer of index K,
    counted from 0; they are ranked by the weights of layer K - 1, mean over heads, of the last prompt token alone;
    `round(n (1 - R))` of them stay, at the positions of the full prompt. That code ranks all samples by a batch's
    first and needs eager attention in layer K - 1; ours ranks each sample, on any attention.

    Args:
        layer: first layer that computes fewer vision tokens.
        keep_ratio: share of the vision tokens that stays (the paper's 1 - R).

    Raises:
        ValueError: a value is out of its range.
    """

    layer: int = 2
    keep_ratio: float = 0.5

    def __post_init__(self) -> None:
        settle(self, whole_number, "layer")
        settle(self, number, "keep_ratio")
        if self.layer < 1:
            raise ValueError(f"layer={self.layer} must be 1 or above: tokens are ranked by the layer before.")
        check_ratio("keep_ratio", self.keep_ratio)

    def validate(self, num_layers: int) -> None:
        check_layer("layer", self.layer, num_layers)

    def check_attention(self, attention: Sequence[bool]) -> None:
        require_attention("layer", [self.layer - 1], attention, shift=1)

    def begin(self, prompt: Prompt) -> AttentionRanking:
        return AttentionRanking({self.layer: self.keep_ratio}, prompt)
