"""`Rules`: VisiPruner's numbers and what they mean; read and checked without torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from latefusion.models.policies.checks import number, settle, whole_number

STAGES = ("shallow", "middle", "deep")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The thresholds of the three stages; the defaults are the paper's for LLaVA-1.5-7B (13B: `sink_rule="half"`).

    Below, `cos_i` is the cosine between the last prompt token's attention output (heads concatenated, before
    o_proj) and the same without vision token i's contribution `c_i`.

    Args:
        boundary: fusion is looked for after this layer; the shallow rule holds in the layers before it.
        layer_threshold: the fusion layer is the first where some `cos_i` is below it.
        tokens_threshold: the fusion layer keeps the tokens with `||c_i||_2` above it (the model's own units).
        exit_threshold: a later layer no longer uses vision if no kept token's `cos_i` is below it.
        exit_patience: the number of such layers, consecutive or not, after which the kept tokens leave.
        stages: any of "shallow", "middle", "deep"; "deep" needs "middle".
        sink_rule: what text sees of vision in layer 0. "first": all its attention to vision goes to the
            first vision token; "half": the first half of the vision tokens is hidden.

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
        settle(self, whole_number, "boundary", "exit_patience")
        settle(self, number, "layer_threshold", "tokens_threshold", "exit_threshold")
        if isinstance(self.stages, str) or not isinstance(self.stages, Iterable):
            raise ValueError(f"stages={self.stages!r} must be a list of 'shallow', 'middle', 'deep'.")
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
