"""How much of what text reads of vision each vision token is: of any rows at once, of the last rows layers together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latefusion.models.flops import MOST_ROWS
from latefusion.models.policies.base import AttentionCall, Prompt

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


class _Layer(NamedTuple):
    """What is kept of a watched layer: its asking rows `[B, H, R, D]`, and the scored keys and values.

    Attributes:
        block: where those stand in the layer's `key_index`.
        mixed: not all of them are vision tokens.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_index: Tensor
    block: slice
    mixed: bool
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
    """`reading_share` of the rows at the end of all samples, behind which and between which no other row asks.

    That is how requests are. A small model's prefill waits for calls, not for products, so layers are kept until tokens
    are to be ranked, then scored as one. Keys and values are a slice, from the first vision token of any sample to its
    last; of text between them the share is 0.

    Args:
        prompt: whose vision tokens are ranked.
        most: of the text before an answer, this number of rows rank; None: all.
    """

    def __init__(self, prompt: Prompt, most: int | None):
        self.prompt = prompt
        self.rows = last_rows(prompt, most)  # how many rows ask; 0: the prompt is not like that
        self._between = (
            max(prompt.n_text) - prompt.tail
        )  # text that stands between vision tokens, or in other rows
        self._waiting: list[_Layer] = []

    @cached_property
    def _in_float32(self) -> AbstractContextManager[Any]:
        """`in_float32`, whose two questions are put once a prefill."""
        return in_float32(self.prompt.vision.device.type)

    def takes(self, call: AttentionCall) -> bool:
        """Whether this layer can be scored so."""
        return self.rows > 0 and call.plain

    def add(self, call: AttentionCall, counts: Sequence[int]) -> None:
        """Keep what the layer's shares are made of, if it sees `counts` vision tokens of the samples."""
        most, end = max(counts), call.key.shape[2] - self.prompt.tail
        block = slice(max(0, end - most - self._between), end)
        mixed = self._between > 0 or min(counts) < most
        query, key, value = call.query[:, :, -self.rows :], call.key[:, :, block], call.value[:, :, block]
        self._waiting.append(_Layer(query, key, value, call.key_index, block, mixed, call.scaling))

    @torch.no_grad()
    def shares(self, before: Tensor | None) -> Tensor | None:
        """The largest shares since the last call, and of those `before`, float32 `[B, T]`; None if there are none."""
        layers, self._waiting = self._waiting, []
        shares = before
        while layers:
            group = [layer for layer in layers if layer.fits(layers[0])]
            layers = [layer for layer in layers if not layer.fits(layers[0])]
            if shares is None:
                shares = torch.zeros_like(self.prompt.vision, dtype=torch.float32)
            self._add(shares, group)
        return shares

    def _add(self, shares: Tensor, layers: Sequence[_Layer]) -> None:
        """Raise the shares `[B, T]` to those of some layers."""
        first, number = layers[0], len(layers)
        query, key, value = first.query, first.key, first.value
        if number > 1:
            query = torch.cat([layer.query for layer in layers])  # [L * B, H, R, D]
            key = torch.cat([layer.key for layer in layers])  # [L * B, Hkv, n, D]
            value = torch.cat([layer.value for layer in layers])
        index = first.key_index[:, first.block]  # [B, n]
        count, width = key.shape[2], query.shape[1] // key.shape[1] * self.rows  # n, G * R
        values = torch.linalg.vector_norm(value.float(), dim=-1).log_()  # [L * B, Hkv, n]
        if first.mixed:
            no_token, index = index < 0, index.clamp(min=0)
            other = no_token | ~self.prompt.vision.gather(1, index)  # [B, n]
            values.unflatten(0, (number, -1)).masked_fill_(other[:, None], float("-inf"))
        with self._in_float32:
            scores = torch.baddbmm(  # twice those of `reading_share`
                values.reshape(-1, 1, count),
                query.float().reshape(-1, width, query.shape[3]),
                key.float().flatten(0, 1).mT,
                beta=2,
                alpha=2 * first.scaling,
            )  # [L * B * Hkv, G * R, n]
        share = scores.softmax(-1).nan_to_num_(0)  # nan: no vision token has a value
        share = share.view(number, index.shape[0], -1, count).amax((0, 2))  # [B, n]
        shares.scatter_reduce_(1, index, share, "amax")


def last_rows(prompt: Prompt, most: int | None) -> int:
    """How many rows at the end of every sample are those that rank; 0: they stand elsewhere, or are too many."""
    tail = prompt.tail
    several = prompt.queries.shape[1] > 1 or any(prompt.n_answer)
    rows = tail if most is None else min(tail, most)
    elsewhere = any(n != tail for n in prompt.n_text) and rows != most
    return 0 if several or elsewhere or rows > MOST_ROWS else rows
