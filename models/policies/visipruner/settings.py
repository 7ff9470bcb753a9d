"""VisiPruner: training-free removal of vision tokens, decided from the model's own attention.

Three stages (arXiv 2510.17205), each decided per sample. *Shallow*: below `boundary`, text does not look at
vision. *Middle*: the first layer above `boundary` where removing one vision token turns the last prompt
token's attention output is the fusion layer; only tokens that contribute to it go on. *Deep*: once removing
any kept token changes nothing, all of them leave too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latefusion.models.layer_kinds import nearest_attention, require_attention
from latefusion.models.policies.visipruner.rules import STAGES, Rules

if TYPE_CHECKING:
    from latefusion.models.policies.base import Decision, Prompt

__all__ = ["STAGES", "VisiPruner"]


@dataclass(frozen=True, kw_only=True)
class VisiPruner(Rules):
    """The paper's pruning, under the numbers that `Rules` describes.

    All three look at softmax attention. Layers that run a recurrence instead (linear attention, a convolution) are
    passed by: they read the vision tokens that are there, also below `boundary`, and no layer of them fuses or counts
    for `exit_patience`.

    The shallow rule drops attention without renormalising the rest. It holds for the prompt's text after its first
    vision token; generated tokens (in training: answers) see all that is left. A prompt that ends in a vision token is
    not pruned. With several queries, what any of them needs is kept.

    What leaves is chosen by the prompt's question: a second question on the same KV cache finds only the tokens that
    the first one needed. See "A second question" in docs/inference.md.
    """

    def validate(self, num_layers: int) -> None:
        fuses = "middle" in self.stages
        limit = num_layers - 2 if fuses else num_layers
        if self.boundary > limit:
            why = "leaves no layer to fuse in" if fuses else "is beyond the end"
            raise ValueError(
                f"boundary={self.boundary} {why} of a decoder with layers 0 to {num_layers - 1}; "
                f"choose at most {limit}."
            )

    def check_attention(self, attention: Sequence[bool]) -> None:
        if self.boundary < len(attention):
            require_attention("boundary", [self.boundary], attention)
        if "middle" in self.stages and not any(attention[self.boundary + 1 :]):
            last = nearest_attention(len(attention), attention)
            raise ValueError(
                f"boundary={self.boundary} leaves no layer to fuse in: no layer after it attends with a softmax; "
                f"choose it before layer {last[0]}, the last that does."
            )

    def begin(self, prompt: Prompt) -> Decision:
        from latefusion.models.policies.visipruner.decision import VisiPrunerDecision  # lazy: it loads torch

        return VisiPrunerDecision(self, prompt)
