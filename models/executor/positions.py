"""Re-indexed positions: the layer's RoPE as if the vision tokens that it does not have had never been there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latefusion.models.executor.layout import Layout
from latefusion.models.policies.base import Prompt


@dataclass(frozen=True, eq=False)
class RotaryCall:
    """One call of the decoder's `rotary_emb`: its arguments by name, and what it gave."""

    module: nn.Module
    arguments: Mapping[str, Any]
    embeddings: tuple[Tensor, Tensor]

    @property
    def position_ids(self) -> Tensor:
        """int64 `[A, B|1, T]`: one axis, or three where positions are those of M-RoPE."""
        found: Tensor = self.arguments["position_ids"]
        return found[None] if found.dim() == 2 else found

    def again(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What it would have given for other positions `[A, B, n]`."""
        given = self.arguments["position_ids"].dim() == 2
        position_ids = position_ids[0] if given else position_ids
        found: tuple[Tensor, Tensor] = self.module.forward(**{**self.arguments, "position_ids": position_ids})
        return found


def positions_of(rotary: Sequence[RotaryCall], prompt: Prompt) -> Tensor:
    """The positions that the model gave a forward, int64 `[A, B|1, T]`.

    Raises:
        ValueError: they are not known, or say too little of what comes in pieces.
    """
    if not rotary:
        raise ValueError(
            "positions=reindexed needs a decoder that makes its RoPE with `rotary_emb`; use positions=original."
        )
    position_ids = rotary[0].position_ids
    if len(position_ids) > 1 and prompt.piece:
        raise ValueError(
            "positions=reindexed cannot prefill an image in pieces where its tokens share positions (M-RoPE): "
            "prefill the prompt at once, or use positions=original."
        )
    return position_ids


@dataclass(frozen=True, eq=False)
class Gaps:
    """What a segment's removed tokens leave behind.

    A position value is free if removed tokens have it (on any axis) and no token of the segment does. Free values are
    closed up: a token moves down by the number of free values below its own. Plain positions become consecutive; an
    image of M-RoPE loses the rows and columns that are empty, and the text after it follows.

    Attributes:
        below: int64 `[A, B, n]`, free values below each token's, in the segment's order.
        free: int64 `[B]`, free values of the forward: what all later tokens move down by.
    """

    below: Tensor
    free: Tensor

    @classmethod
    def of(cls, position_ids: Tensor, layout: Layout, real: Tensor) -> Gaps:
        """Of a segment, without a host sync.

        Args:
            position_ids: int64 `[A, B|1, T]`.
            layout: the segment's tokens.
            real: bool `[B, T]`, false for padding.
        """
        batch, length = real.shape
        axes = position_ids.shape[0]
        present = torch.zeros_like(real).scatter(1, layout.index, _valid(layout))  # [B, T]
        values = position_ids.expand(axes, batch, length).transpose(0, 1).flatten(1)  # [B, A * T]
        removed = (real & ~present).repeat(1, axes)
        counted = real.repeat(1, axes)
        # equal values side by side, those of present tokens first; padding last
        key = torch.where(counted, 2 * values + removed, torch.iinfo(torch.long).max)
        key, order = key.sort(dim=1)
        value = key.div(2, rounding_mode="floor")
        first = torch.ones_like(removed)
        first[:, 1:] = value[:, 1:] != value[:, :-1]
        free = first & removed.gather(1, order)  # the first of its value is not present: none is
        below = torch.zeros_like(values).scatter(1, order, free.cumsum(1))
        below = below.unflatten(1, (axes, length)).transpose(0, 1)  # [A, B, T]
        return cls(below.gather(2, layout.index.expand(axes, -1, -1)), free.sum(1))


def _valid(layout: Layout) -> Tensor:
    return torch.ones_like(layout.index, dtype=torch.bool) if layout.valid is None else layout.valid


def moved(call: RotaryCall, layout: Layout | None, gaps: Gaps | None, earlier: Tensor | None) -> Any:
    """The segment's `(cos, sin)`, `[B, n, D]`.

    Args:
        layout: its tokens; None: all.
        gaps: that it leaves; None: it leaves none.
        earlier: int64 `[B]`, free values of earlier forwards; None: there are none.
    """
    position_ids = call.position_ids  # [A, B|1, T]
    if layout is not None:
        index = layout.index.expand(position_ids.shape[0], -1, -1)
        position_ids = position_ids.expand(-1, layout.index.shape[0], -1).gather(2, index)
    if gaps is not None:
        position_ids = position_ids - gaps.below
    if earlier is not None:
        position_ids = position_ids - earlier[:, None]
    return call.again(position_ids.clamp(min=0))
