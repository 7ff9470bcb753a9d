"""One prefill under a `VisionSchedule`: which vision tokens take part in each layer, and how `keep` ranks them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from latefusion.models.policies.base import AttentionCall, Prompt, Selection
from latefusion.models.policies.ranking import best

ROWS_AT_ONCE = 64  # query rows whose attention is held at a time


class ScheduleDecision:
    """One prefill under a `VisionSchedule`: everything but the ranking is known on the host.

    Args:
        sees: whether each layer sees vision tokens.
        keep: {layer: the number of vision tokens that are left from there on}.
        watch: layers whose attention ranks vision tokens.
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
        ahead: Collection[int] = (),
        silent: bool = False,
    ):
        self.prompt, self.sees, self.keep, self.watch, self.frozen = prompt, sees, keep, watch, frozen
        self.kept, self.counts = prompt.vision, prompt.n_vision  # bool [B, T]: those that are left
        self.scores: Tensor | None = None  # float32 [B, T]
        self.rows = asking(prompt) if watch else prompt.queries  # int64 [B, R]
        self.ahead = ahead
        self.silent = prefix(prompt) if silent else None  # bool [B, T]

    def select(self, layer: int) -> Selection | None:
        if layer in self.keep:
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
        shares = [
            reading_share(call, rows, self.prompt.vision) for rows in self.rows.split(ROWS_AT_ONCE, dim=1)
        ]
        score = call.to_logical(torch.stack(shares).amax(0), self.prompt.vision.shape[1])  # [B, T]
        self.scores = score if self.scores is None else torch.maximum(self.scores, score)
        return None

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


@torch.no_grad()
def reading_share(call: AttentionCall, rows: Tensor, vision: Tensor) -> Tensor:
    """The largest share that each vision token has in what one head of one row reads of vision, float32 `[B, K]`.

    What head h of row r reads of token i is `a[h, r, i] * v[h, i]`; its share is that vector's squared norm over the
    sum of them for all vision tokens of the layer. A head that looks at one patch alone counts as much as a loud one.

    Args:
        rows: logical query rows, int64 `[B, R]`.
        vision: bool `[B, T]`, the vision tokens.
    """
    weights = call.weights(call.compact_rows(rows))  # [B, H, R, K]
    groups = weights.shape[1] // call.value.shape[1]
    value_sq = call.value.float().square().sum(-1)  # [B, Hkv, K]
    value_sq = value_sq.repeat_interleave(groups, dim=1)[:, :, None]  # [B, H, 1, K]
    seen = vision.gather(1, call.key_index.clamp(min=0)) & (call.key_index >= 0)  # bool [B, K]
    read = weights.square() * value_sq * seen[:, None, None]  # [B, H, R, K]
    total = read.sum(-1, keepdim=True).clamp(min=torch.finfo(read.dtype).tiny)
    return (read / total).amax((1, 2))


def asking(prompt: Prompt) -> Tensor:
    """The rows that rank vision tokens: the prompt's text and its queries, int64 `[B, R]`, without a host sync."""
    ranks = prompt.text.scatter(1, prompt.queries, True)  # bool [B, T]
    n_text = max(real - vision for real, vision in zip(prompt.n_real, prompt.n_vision, strict=True))
    most = min(n_text + prompt.queries.shape[1], ranks.shape[1])
    rows = ranks.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # [B, R]
    return torch.where(ranks.gather(1, rows), rows, prompt.queries[:, :1])
