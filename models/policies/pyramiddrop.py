"""PyramidDrop, inference: stages with fewer vision tokens each (Xing et al., CVPR 2025, arXiv 2410.17247)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from latefusion.models.layer_kinds import require_attention
from latefusion.models.policies.base import Prompt
from latefusion.models.policies.checks import check_layer, check_ratio, number, whole_number
from latefusion.models.policies.ranking import AttentionRanking

PAPER = {8: 0.5, 16: 0.25, 24: 0.125}  # LLaVA-1.5-7B, 32 layers


@dataclass(frozen=True, kw_only=True)
class PyramidDrop:
    """At the start of each stage, the vision tokens stay to which the last prompt token pays most attention.

    The defaults are the paper's four stages for LLaVA-1.5-7B, each with half the tokens of the one before (the
    official README's `layer_list` [8,16,24], `image_token_ratio_list` [1.0,0.5,0.25,0.125]); shares are of all vision
    tokens. As in the official code (github.com/Cooperx521/PyramidDrop, `pdrop_rank_drop` in
    `llava/model/modeling_llama_pdrop.py`), the last prompt token's attention ranks them, mean over heads. It differs
    in three things. It ranks by the next layer's norm, queries and keys, projected once more for all tokens; we by
    the attention of the stage's last layer, which is there anyway. It renumbers what is left, so RoPE moves tokens
    together, and shifts the positions of generated tokens layer by layer; ours keep the prompt's positions. It cuts a
    share down (`int`), which we round. It knows one image a sample and right padding.

    Args:
        keep_ratios: {first layer of a stage: share of all vision tokens that stays from there on}.

    Raises:
        ValueError: a value is out of its range.
    """

    keep_ratios: Mapping[int, float] = field(default_factory=lambda: dict(PAPER))

    def __post_init__(self) -> None:
        if not isinstance(self.keep_ratios, Mapping):
            raise ValueError(
                f"keep_ratios={self.keep_ratios!r} must map layers to shares: {{8: 0.5, 16: 0.25}}."
            )
        ratios = {
            whole_number("keep_ratios", layer): number("keep_ratios", ratio)
            for layer, ratio in self.keep_ratios.items()
        }
        ratios = dict(sorted(ratios.items()))
        object.__setattr__(self, "keep_ratios", ratios)
        if not ratios:
            raise ValueError("keep_ratios={} drops nothing; name at least one {layer: share}.")
        before = 1.0
        for layer, ratio in ratios.items():
            if layer < 1:
                raise ValueError(
                    f"keep_ratios names layer {layer}, but tokens are ranked by the layer before; "
                    "choose 1 or above."
                )
            check_ratio(f"keep_ratios[{layer}]", ratio)
            if ratio > before:
                raise ValueError(
                    f"keep_ratios[{layer}]={ratio} grows from {before}: a token that left does not return."
                )
            before = ratio

    def validate(self, num_layers: int) -> None:
        for layer in self.keep_ratios:
            check_layer("a layer of keep_ratios", layer, num_layers)

    def check_attention(self, attention: Sequence[bool]) -> None:
        require_attention("a layer of keep_ratios", [i - 1 for i in self.keep_ratios], attention, shift=1)

    def begin(self, prompt: Prompt) -> AttentionRanking:
        return AttentionRanking(self.keep_ratios, prompt)
