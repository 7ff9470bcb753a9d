"""How much of what text reads of vision each vision token is: of any rows at once, of the last rows layers together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latefusion.models.policies.base import AttentionCall, Prompt

UNREAD = -1e5
"""In place of log |v|, of keys that are no vision tokens: they take part only where no vision token has a value."""

MOST_KEYS = 1024  # of all samples: layers of fewer keys are scored together, others as they run


def in_float32(device: str) -> AbstractContextManager[Any]:
    """No autocast inside: training's would multiply in bfloat16. Devices without any have nothing to turn off."""
    if torch.amp.autocast_mode.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def reading_share(scores: Tensor, values: Tensor) -> Tensor:
    """The largest share that each vision token has in what one head of one row reads of vision, float32 `[B, n]`.

    What head h of row r reads of token i is `a[h, r, i] * v[h, i]`; its share is that vector's squared norm over the
    sum of them for all vision tokens of the layer. A head that looks at one patch alone counts as much as a loud one.
    As `a` is a softmax of `scores`, whose denominator is the same for all tokens, the share is one of
    `2 * (scores + log |v|)` over the vision tokens alone.

    Args:
        scores: of attention, before its softmax, float32 `[B, H, R, n]`; changed in place.
        values: log |v| of the tokens, float32 `[B, Hkv, n]`, -inf for a key that is not a vision token.
    """
    grouped = scores.view(len(scores), values.shape[1], -1, *scores.shape[2:])  # [B, Hkv, G, R, n]
    share = grouped.add_(values[:, :, None, None]).mul_(2).softmax(-1)
    return share.nan_to_num_(0).amax((1, 2, 3))  # nan: the row sees no vision token


@dataclass(frozen=True)
class _Layer:
    """What is kept of a watched layer: its asking rows `[B, H, R, D]`, keys and values of its vision tokens.

    Attributes:
        key_index: of the layer's `AttentionCall`.
        block: where the vision tokens stand in it, in every sample.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_index: Tensor
    block: slice
    scaling: float

    def fits(self, other: _Layer) -> bool:
        """Whether both can be scored in one product."""
        return (
            self.key_index is other.key_index
            and self.scaling == other.scaling
            and self.key.shape == other.key.shape
            and self.query.shape == other.query.shape
            and self.key.device == other.key.device
        )


class LastRows:
    """`reading_share` of the rows at the end of all samples, where the vision tokens stand in one block before them.

    That is how requests about one image are: keys and values of vision tokens are a slice. A small model's prefill
    waits for calls, not for products, so layers are kept until tokens are to be ranked, then scored as one.

    Args:
        prompt: whose vision tokens are ranked.
        rows: how many rows ask; 0: the prompt is not like that.
    """

    def __init__(self, prompt: Prompt, rows: int):
        self.prompt, self.rows = prompt, rows
        self._waiting: list[_Layer] = []

    def takes(self, call: AttentionCall, counts: Sequence[int]) -> bool:
        """Whether this layer, which sees `counts` vision tokens of the samples, can be scored so."""
        return self.rows > 0 and call.plain and min(counts) == max(counts)

    def add(self, call: AttentionCall, count: int) -> None:
        """Keep what the layer's shares are made of, if it sees `count` vision tokens of each sample."""
        end = call.key.shape[2] - self.prompt.tail
        block = slice(end - count, end)
        query, key, value = call.query[:, :, -self.rows :], call.key[:, :, block], call.value[:, :, block]
        self._waiting.append(_Layer(query, key, value, call.key_index, block, call.scaling))

    @torch.no_grad()
    def shares(self, before: Tensor | None) -> Tensor | None:
        """The largest shares since the last call, and of those `before`, float32 `[B, T]`; None if there are none."""
        layers, self._waiting = self._waiting, []
        shares = before
        while layers:
            group = [layer for layer in layers if layer.fits(layers[0])]
            layers = [layer for layer in layers if not layer.fits(layers[0])]
            new = self._shares(group)
            shares = new if shares is None else torch.maximum(shares, new)
        return shares

    def _shares(self, layers: Sequence[_Layer]) -> Tensor:
        """`[B, T]`."""
        first = layers[0]
        query, key, value = first.query, first.key, first.value
        if len(layers) > 1:
            query = torch.cat([layer.query for layer in layers])  # [L * B, H, R, D]
            key = torch.cat([layer.key for layer in layers])  # [L * B, Hkv, n, D]
            value = torch.cat([layer.value for layer in layers])
        count, width = key.shape[2], query.shape[1] // key.shape[1] * self.rows  # n, G * R
        values = torch.linalg.vector_norm(value.float(), dim=-1).log_()  # [L * B, Hkv, n]
        with in_float32(query.device.type):
            scores = torch.baddbmm(  # twice those of `reading_share`
                values.reshape(-1, 1, count),
                query.float().reshape(-1, width, query.shape[3]),
                key.float().flatten(0, 1).mT,
                beta=2,
                alpha=2 * first.scaling,
            )  # [L * B * Hkv, G * R, n]
        share = scores.softmax(-1).nan_to_num_(0)  # nan: no vision token has a value
        share = share.view(len(layers), -1, query.shape[1] * self.rows, count).amax((0, 2))  # [B, n]
        shares = share.new_zeros(self.prompt.vision.shape)
        return shares.scatter_(1, first.key_index[:, first.block], share)
