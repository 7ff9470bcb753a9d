"""VTW, visual tokens withdrawal (Lin et al., AAAI 2025, arXiv 2405.05803)."""

from __future__ import annotations

from dataclasses import dataclass

from latefusion.models.policies.base import Decision, Prompt
from latefusion.models.policies.checks import check_layer, settle, whole_number
from latefusion.models.schedule import VisionSchedule


@dataclass(frozen=True, kw_only=True)
class VTW:
    """All vision tokens leave at `layer`; the default is that of the official code for LLaVA-1.5-7B's 32 layers.

    That code (github.com/lzhxmu/VTW, `llava/model/language_model/VTW.py`) drops them before the layer of index
    `k = 15`, counted from 0, and keeps the text's positions, as we do (`pe_type="keep"`, its default). It drops
    columns 35 to 610 of a batch; ours drops each sample's own vision tokens. Its search for k (the first layer whose
    mean KL to dense is at most 0.003) is not part of this policy.

    Args:
        layer: first layer that no longer sees vision tokens.

    Raises:
        ValueError: the layer is out of its range.
    """

    layer: int = 15

    def __post_init__(self) -> None:
        settle(self, whole_number, "layer")
        if self.layer < 1:
            raise ValueError(
                f"layer={self.layer} leaves no layer that sees vision tokens; choose 1 or above."
            )

    def validate(self, num_layers: int) -> None:
        check_layer("layer", self.layer, num_layers)

    def begin(self, prompt: Prompt) -> Decision | None:
        return VisionSchedule(exit=self.layer).begin(prompt)
