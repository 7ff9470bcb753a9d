"""VisiPruner: training-free removal of vision tokens, decided from the model's own attention.

Three stages (arXiv 2510.17205), each decided per sample. *Shallow*: below `boundary`, text does not look at
vision. *Middle*: the first layer above `boundary` where removing one vision token turns the last prompt
token's attention output is the fusion layer; only tokens that contribute to it go on. *Deep*: once removing
any kept token changes nothing, all of them leave too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latefusion.models.policies.base import Prompt
    from latefusion.models.policies.visipruner.decision import VisiPrunerDecision

STAGES = ("shallow", "middle", "deep")


@dataclass(frozen=True, kw_only=True)
class VisiPruner:
    """The paper's pruning; the defaults are its setting for LLaVA-1.5-7B (13B: `sink_rule="half"`).

    Below, `cos_i` is the cosine between the last prompt token's attention output (heads concatenated, before
    o_proj) and the same without vision token i's contribution `c_i`.

    Args:
        boundary: fusion is looked for after this layer; the shallow rule holds in the layers before it.
        layer_threshold: the fusion layer is the first where some `cos_i` is below it.
        tokens_threshold: the fusion layer keeps the tokens with `||c_i||_2` above it (the model's own units).
        exit_threshold: a later layer no longer uses vision if no kept token's `cos_i` is below it.
        exit_patience: after so many such layers, consecutive or not, the kept tokens leave.
        stages: any of "shallow", "middle", "deep"; "deep" needs "middle".
        sink_rule: what text may see of vision in layer 0. "first": all its attention to vision goes to the
            first vision token; "half": the first half of the vision tokens is hidden.

    The shallow rule drops attention without renormalising the rest. It rules the prompt's text after its
    first vision token; generated tokens (in training: answers) see all that is left. A
    prompt that ends in a vision token is not pruned. With several queries, what any of them needs is kept.

    Raises:
        ValueError: a value is out of its range.
    """

    boundary: int = 6
    layer_threshold: float = 0.995
    tokens_threshold: float = 0.2
    exit_threshold: float = 0.999
    exit_patience: int = 2
    stages: tuple[str, ...] = STAGES
    sink_rule: str = "first"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("stages=() prunes nothing; name at least one of 'shallow', 'middle', 'deep'.")
        for stage in self.stages:
            if stage not in STAGES:
                raise ValueError(f"stages names {stage!r}; use 'shallow', 'middle', 'deep'.")
        if "deep" in self.stages and "middle" not in self.stages:
            raise ValueError(
                f"stages={self.stages} has 'deep' without 'middle', whose kept tokens it drops; add 'middle'."
            )
        if self.boundary < 0:
            raise ValueError(f"boundary={self.boundary} must not be negative; layers count from 0.")
        for name in ("layer_threshold", "exit_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} is a cosine; choose it above 0 and at most 1."
                )
        if not self.tokens_threshold >= 0:
            raise ValueError(f"tokens_threshold={self.tokens_threshold} is a norm; choose it 0 or above.")
        if self.exit_patience < 1:
            raise ValueError(f"exit_patience={self.exit_patience} counts layers; choose it 1 or above.")
        if self.sink_rule not in ("first", "half"):
            raise ValueError(f"sink_rule={self.sink_rule!r} is unknown; use 'first' or 'half'.")

    def validate(self, num_layers: int) -> None:
        fuses = "middle" in self.stages
        limit = num_layers - 2 if fuses else num_layers
        if self.boundary > limit:
            why = "leaves no layer to fuse in" if fuses else "is beyond the end"
            raise ValueError(
                f"boundary={self.boundary} {why} of a decoder with layers 0 to {num_layers - 1}; "
                f"choose at most {limit}."
            )

    def begin(self, prompt: Prompt) -> VisiPrunerDecision:
        from latefusion.models.policies.visipruner.decision import (
            VisiPrunerDecision,  # torch, which a typo need not wait for
        )

        return VisiPrunerDecision(self, prompt)
