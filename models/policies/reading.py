"""How much of what text reads of vision each vision token is: of any rows at once, of the last rows layers together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from latefusion.models.flops import MOST_KEYS
from latefusion.models.policies.base import AttentionCall, Prompt


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
    """What is kept of a watched layer: its asking rows `[B, H, R, D]`, and its own keys and values."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_index: Tensor
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
    """`reading_share` of the rows at the end of all samples, of the layers since the last drop together.

    A small model's prefill waits for calls, not for products: so layers are kept until tokens are to be ranked, then
    scored as one, with all of their keys. They are those that a cache holds anyway.

    Args:
        prompt: whose vision tokens are ranked.
        rows: how many rows ask; all vision tokens stand before them.
    """

    def __init__(self, prompt: Prompt, rows: int):
        self.prompt, self.rows = prompt, rows
        self._waiting: list[_Layer] = []
        self._vision: Tensor | None = None  # float32 [B, 1 + T], 1 for vision tokens, 0 for all else

    def takes(self, call: AttentionCall) -> bool:
        """Whether this layer is one of those that are scored together."""
        return self.rows > 0 and call.plain and call.key_index.numel() <= MOST_KEYS

    def add(self, call: AttentionCall) -> None:
        """Keep what the layer's shares are made of."""
        query = call.query[:, :, -self.rows :]
        self._waiting.append(_Layer(query, call.key, call.value, call.key_index, call.scaling))

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
        columns = layers[0].key_index + 1  # [B, K]; 0: keys without a position
        if self._vision is None:
            self._vision = pad(self.prompt.vision.float(), (1, 0))
        query, key, value = (
            parts[0] if len(parts) == 1 else torch.cat(parts)
            for parts in zip(*((layer.query, layer.key, layer.value) for layer in layers), strict=True)
        )  # [L * B, H, R, D], [L * B, Hkv, K, D] twice
        size = torch.linalg.vector_norm(value.float(), dim=-1)  # [L * B, Hkv, K]
        size = size.view(len(layers), len(columns), -1, columns.shape[1])  # [L, B, Hkv, K]
        values = size.mul_(self._vision.gather(1, columns)[:, None]).log_()  # -inf but for vision tokens
        width = query.shape[1] // key.shape[1] * self.rows  # G * R
        with in_float32(query.device.type):
            scores = torch.baddbmm(  # twice those of `reading_share`
                values.view(-1, 1, columns.shape[1]),
                query.float().reshape(-1, width, query.shape[3]),
                key.float().flatten(0, 1).mT,
                beta=2,
                alpha=2 * layers[0].scaling,
            )  # [L * B * Hkv, G * R, K]
        share = scores.softmax(-1).nan_to_num_(0)  # nan: no vision token has a value
        share = share.view(len(layers), len(columns), -1, columns.shape[1]).amax((0, 2))  # [B, K]
        return torch.zeros_like(self._vision).scatter_(1, columns, share)[:, 1:]
