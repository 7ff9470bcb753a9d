"""Several boards in one pass: samples padded to a batch that gives each board what it would get alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latefusion.models.executor.prompt import IGNORE
from latefusion.training.smollm_icons.question_tree import Tree

ALIGNED = 32  # lengths that fast attention kernels like, and few of them


class Sample(NamedTuple):
    """One board: its questions, the places of its vision tokens, and these as one of three.

    `rows` of the composer's bank, picture `features` [K, CHANNELS], or `words` [K, width] behind the projector.
    """

    tree: Tree
    places: list[int]
    rows: list[int] | None = None
    features: Tensor | None = None
    words: Tensor | None = None


class Batch(NamedTuple):
    """B boards with K vision and T text tokens, padded behind."""

    ids: Tensor  # [B, T]
    depths: Tensor  # [B, T]
    sees: Tensor  # [B, T, T], bool; padding sees itself
    places: Tensor  # [B, K]
    shown: Tensor  # [B, K], bool: False for padding
    learnt: Tensor  # [L], indices into the B * T text tokens that must predict something
    labels: Tensor  # [L]
    weights: Tensor  # [L]: every board counts the same in the loss, every label of a board too
    rows: Tensor | None  # [B, K]
    features: Tensor | None  # [B, K, CHANNELS]
    words: Tensor | None  # [B, K, width]

    def to(self, device: torch.device | str) -> Batch:
        parts: list[Any] = [x if x is None else x.to(device, non_blocking=True) for x in self]
        return Batch(*parts)

    def with_features(self, bank: Tensor) -> Batch:
        """The batch with the features of its rows; `bank` [N, CHANNELS]."""
        return self if self.rows is None else self._replace(features=bank[self.rows], rows=None)

    def without_vision(self) -> Batch:
        none = self.places[:, :0]
        return self._replace(places=none, shown=none.bool(), rows=None, features=None, words=None)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one kind as a batch."""
    n_vision = max(len(sample.places) for sample in samples)
    n_text = max(len(sample.tree.ids) for sample in samples)
    if len(samples) > 1:
        n_text += -(n_vision + n_text) % ALIGNED
    size = len(samples)
    ids, depths = (torch.zeros(size, n_text, dtype=torch.long) for _ in range(2))
    sees = torch.eye(n_text, dtype=torch.bool).repeat(size, 1, 1)
    places = torch.zeros(size, n_vision, dtype=torch.long)
    shown = torch.zeros(size, n_vision, dtype=torch.bool)
    learnt, labels, weights = [], [], []
    for k, (tree, at, *_) in enumerate(samples):
        n = len(tree.ids)
        ids[k, :n], depths[k, :n] = torch.tensor(tree.ids), torch.tensor(tree.depths)
        sees[k, :n, :n] = tree.sees
        places[k, : len(at)], shown[k, : len(at)] = torch.tensor(at, dtype=torch.long), True
        ends = [node for node, label in enumerate(tree.labels) if label != IGNORE]
        learnt += [k * n_text + node for node in ends]
        labels += [tree.labels[node] for node in ends]
        weights += [1 / (size * len(ends))] * len(ends)
    return Batch(
        ids, depths, sees, places, shown, torch.tensor(learnt), torch.tensor(labels), torch.tensor(weights),
        _padded([sample.rows for sample in samples], n_vision),
        _padded([sample.features for sample in samples], n_vision),
        _padded([sample.words for sample in samples], n_vision),
    )  # fmt: skip


def _padded(parts: Sequence[list[int] | Tensor | None], length: int) -> Tensor | None:
    if parts[0] is None:
        return None
    tensors = [torch.as_tensor(part) for part in parts]
    batch = tensors[0].new_zeros(len(parts), length, *tensors[0].shape[1:])
    for k, part in enumerate(tensors):
        batch[k, : len(part)] = part
    return batch


def attention(batch: Batch, opening: int, dtype: torch.dtype, hidden: bool = False) -> Tensor:
    """Additive mask [B, 1, S, S] of an opening, the pictures (both causal) and the trees behind them.

    With `hidden`, the trees do not see the pictures.
    """
    before, size = opening + batch.places.shape[1], len(batch.ids)
    total = before + batch.ids.shape[1]
    sees = torch.zeros(size, total, total, dtype=torch.bool, device=batch.ids.device)
    sees[:, :before, :before] = torch.ones(before, before, dtype=torch.bool, device=sees.device).tril()
    sees[:, before:, :opening] = True
    if not hidden:
        sees[:, before:, opening:before] = batch.shown[:, None]
    sees[:, before:, before:] = batch.sees
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(
        ~sees, torch.finfo(dtype).min
    )[:, None]
