"""VTW, visual tokens withdrawal (Lin et al., AAAI 2025, arXiv 2405.05803)."""

from __future__ import annotations

from dataclasses import dataclass

from latefusion.models.policies.base import Decision, Prompt
from latefusion.models.policies.ranking import check_layer
from latefusion.models.schedule import VisionSchedule


@dataclass(frozen=True, kw_only=True)
class VTW:
    """All vision tokens leave at `layer`; the default is the paper's K = 16 for LLaVA-1.5-7B's 32 layers.

    Args:
        layer: first layer that no longer sees vision tokens.

    Raises:
        ValueError: the layer is out of its range.
    """

    layer: int = 16

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise ValueError(
                f"layer={self.layer} leaves no layer that sees vision tokens; choose 1 or above."
            )

    def validate(self, num_layers: int) -> None:
        check_layer("layer", self.layer, num_layers)

    def begin(self, prompt: Prompt) -> Decision:
        return VisionSchedule(exit=self.layer).begin(prompt)
