"""One prefill under a `VisionSchedule`: which vision tokens take part in each layer, and how `keep` ranks them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from latefusion.models.flops import MOST_ROWS
from latefusion.models.policies.base import AttentionCall, Prompt, Selection
from latefusion.models.policies.ranking import best
from latefusion.models.policies.reading import MOST_KEYS, LastRows, reading_share


@dataclass(frozen=True)
class _Places:
    """Where a segment's layers hold what ranks: the same tensors for all of them.

    Attributes:
        key_index: of the segment's `AttentionCall`s.
        rows: compact places of the asking rows, int64 `[B, R]`, at most `MOST_ROWS` each.
        keys: places of the vision tokens among the keys, int64 `[B, n]`.
        present: bool `[B, n]`, false where a sample has fewer; None: nowhere.
        positions: logical positions of `keys`, int64 `[B, n]`.
    """

    key_index: Tensor
    rows: tuple[Tensor, ...]
    keys: Tensor
    present: Tensor | None
    positions: Tensor


class ScheduleDecision:
    """One prefill under a `VisionSchedule`: everything but the ranking is known on the host.

    Args:
        sees: whether each layer sees vision tokens.
        keep: {layer: the number of vision tokens that are left from there on}.
        watch: layers whose attention ranks vision tokens.
        rows: most text tokens before an answer that rank vision tokens; None: all.
        frozen: vision tokens are only read, in the layers that see them.
        ahead: layers that HiDrop's rule ranks in, before they run, in place of `watch`.
        silent: the attention output of the text before the image is zero (ViCA for 7B).
    """

    fusion_layer = None

    def __init__(
        self,
        prompt: Prompt,
        *,
        sees: Sequence[bool],
        keep: Mapping[int, int],
        watch: Collection[int],
        frozen: bool,
        rows: int | None = None,
        ahead: Collection[int] = (),
        silent: bool = False,
    ):
        self.prompt, self.sees, self.keep, self.watch, self.frozen = prompt, sees, keep, watch, frozen
        self.kept, self.counts = prompt.vision, prompt.n_vision  # bool [B, T]: those that are left
        self.scores: Tensor | None = None  # float32 [B, T]
        self.most = rows
        self.last_rows = LastRows(prompt, rows)
        self._places: _Places | None = None  # of the running segment
        self.ahead = ahead
        self.silent = prefix(prompt) if silent else None  # bool [B, T]

    @cached_property
    def rows(self) -> Tensor:
        """The rows that rank, int64 `[B, R]`."""
        return asking(self.prompt, self.most) if self.watch else self.prompt.queries

    def select(self, layer: int) -> Selection | None:
        if layer in self.keep:
            self.scores = self.last_rows.shares(self.scores)
            assert self.scores is not None, "the layer before was not watched"
            asks = self.prompt.asks or (True,) * len(self.counts)
            self.counts = tuple(
                min(self.keep[layer], n) if ask else n for n, ask in zip(self.counts, asks, strict=True)
            )
            self.kept = best(self.scores, self.kept, self.counts)
        sees = self.sees[layer]
        same = sees if layer == 0 else sees == self.sees[layer - 1]  # all take part before layer 0
        if same and layer not in self.keep and not (self.frozen and layer == 0):
            return None
        if not sees:
            return Selection(torch.zeros_like(self.kept), (0,) * len(self.counts), self.frozen, self.silent)
        return Selection(self.kept, self.counts, self.frozen, self.silent)

    def attended(self, layer: int, call: AttentionCall) -> Tensor | None:
        if self.last_rows.takes(call):
            self.last_rows.add(call, self.counts)
            if call.key_index.numel() > MOST_KEYS:
                self.scores = self.last_rows.shares(self.scores)
        else:
            self._score(call)
        return None

    @torch.no_grad()
    def _score(self, call: AttentionCall) -> None:
        """Add the shares of a layer's vision tokens to the scores, wherever vision tokens and asking rows stand."""
        places = self._places
        if places is None or places.key_index is not call.key_index:  # the first layer of a segment
            keys, present = vision_keys(call, self.kept, self.counts)
            # where a key is not a vision token, its share is 0
            positions = call.key_index.gather(1, keys).clamp(min=0)
            parts = call.compact_rows(self.rows).split(MOST_ROWS, dim=1)
            self._places = places = _Places(call.key_index, parts, keys, present, positions)
        values = log_size(call.value, places.keys, places.present)  # [B, Hkv, n]
        for part in places.rows:
            share = reading_share(call.scores(part, places.keys), values)  # [B, n]
            if self.scores is None:
                self.scores = values.new_zeros(self.kept.shape)
            self.scores.scatter_reduce_(1, places.positions, share, "amax")

    def looked(self, layer: int, call: AttentionCall) -> None:
        weights = call.weights(call.compact_rows(self.rows)).mean(1)  # [B, R, K]
        score = (weights * distinct(self.rows)[:, :, None]).sum(1)  # [B, K]
        self.scores = call.to_logical(score, self.prompt.vision.shape[1])  # [B, T]


def distinct(rows: Tensor) -> Tensor:
    """Weights by which the different values of each row count alike, and sum to 1, float32 `[B, R]`."""
    same = rows[:, :, None] == rows[:, None, :]  # [B, R, R]
    first = ~(same.tril(-1)).any(2)  # bool [B, R]
    return first / first.sum(1, keepdim=True)


def prefix(prompt: Prompt) -> Tensor:
    """The text before the first vision token of each sample that has one, bool `[B, T]`."""
    before = prompt.real & ~prompt.vision & (prompt.vision.cumsum(1) == 0)
    return before & prompt.vision.any(1, keepdim=True)


def log_size(value: Tensor, keys: Tensor, present: Tensor | None) -> Tensor:
    """log |v| of the values `[B, Hkv, K, D]` at `keys` `[B, n]`, -inf where none is `present`, `[B, Hkv, n]`."""
    size = torch.linalg.vector_norm(value.float(), dim=-1)  # [B, Hkv, K]
    size = size.gather(2, keys[:, None].expand(-1, value.shape[1], -1)).log()  # [B, Hkv, n]
    return size if present is None else size.masked_fill(~present[:, None], float("-inf"))


def vision_keys(call: AttentionCall, vision: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Where the vision tokens (bool `[B, T]`, `counts` a sample) stand among a layer's keys, without a host sync.

    Returns:
        int64 `[B, n]`, and bool `[B, n]`: false where a sample has fewer, and the index is that of another key; None if
        none has.
    """
    among = vision.gather(1, call.key_index.clamp(min=0)) & (call.key_index >= 0)  # bool [B, K]
    order = among.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, *counts)]
    return order, None if min(counts) == order.shape[1] else among.gather(1, order)


def asking(prompt: Prompt, most: int | None = None) -> Tensor:
    """The rows that rank vision tokens: the prompt's text and its queries, int64 `[B, R]`, without a host sync.

    Args:
        most: of each query and the text before it, this number of rows; None: all.
    """
    ranks = prompt.text.scatter(1, prompt.queries, True)  # bool [B, T]
    n_text = max(real - vision for real, vision in zip(prompt.n_real, prompt.n_vision, strict=True))
    width = min(n_text + prompt.queries.shape[1], ranks.shape[1])
    if most is not None and most < width:
        place = ranks.cumsum(1)  # [B, T]
        before = place.gather(1, prompt.queries)[:, :, None] - place[:, None]  # [B, Q, T]
        ranks = ranks & ((before >= 0) & (before < most)).any(1)
        width = min(width, most * prompt.queries.shape[1])
    rows = ranks.int().argsort(dim=1, descending=True, stable=True)[:, :width]  # [B, R]
    return torch.where(ranks.gather(1, rows), rows, prompt.queries[:, :1])
