"""Knock-outs: the same model, with one of the ways by which vision reaches text taken away."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from latefusion.models.executor.cache import SUPPORTED, ScheduledLayer, ScheduledSlidingLayer, Track
from latefusion.models.policies.base import AttentionCall, Prompt


@dataclass(frozen=True)
class KnockOut:
    """A policy: in `layers`, no text token after the first vision token sees any vision token.

    Everything else is as in the dense model: vision tokens are computed in every layer, and what text attends to is
    renormalised without them ("attention knock-out", Geva et al., arXiv 2304.14767). Unlike a prompt's text, which
    other policies rule, answers are ruled as well.
    """

    layers: Collection[int]

    def validate(self, num_layers: int) -> None:
        for layer in self.layers:
            if not 0 <= layer < num_layers:
                raise ValueError(
                    f"layers names layer {layer}, but the decoder has layers 0 to {num_layers - 1}; choose among them."
                )

    def begin(self, prompt: Prompt) -> _KnockOutDecision:
        return _KnockOutDecision(self, prompt)


class _KnockOutDecision:
    fusion_layer = None

    def __init__(self, policy: KnockOut, prompt: Prompt):
        self.prompt, self.watch = prompt, set(policy.layers)
        ruled = prompt.real & ~prompt.vision & (prompt.vision.cumsum(1) > 0)  # bool [B, T]
        self.rows, self.valid = _rows(ruled)  # [B, R], bool [B, R]

    def select(self, layer: int) -> None:
        return None

    @torch.no_grad()
    def attended(self, layer: int, call: AttentionCall) -> Tensor | None:
        if not self.rows.shape[1]:
            return None
        rows = call.compact_rows(self.rows)
        weights = call.weights(rows)  # [B, H, R, K]
        keys = call.key_index  # [B, K]
        hidden = self.prompt.vision.gather(1, keys.clamp(min=0)) & (keys >= 0)
        weights = weights.masked_fill(hidden[:, None, None, :], 0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        grouped = weights.unflatten(1, (call.value.shape[1], -1))  # [B, Hkv, G, R, K]
        blind = (grouped @ call.value.float()[:, :, None]).flatten(1, 2).transpose(1, 2)  # [B, R, H, D]
        index = rows[:, :, None, None].expand(-1, -1, *call.output.shape[2:])
        blind = torch.where(
            self.valid[:, :, None, None], blind.to(call.output.dtype), call.output.gather(1, index)
        )
        return call.output.scatter(1, index, blind)


def _rows(ruled: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the true cells of each row, int64 `[B, R]`, and which of them are no filling, bool `[B, R]`."""
    most = int(ruled.sum(1).amax())
    rows = ruled.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return rows, ruled.gather(1, rows)


@contextmanager
def frozen(layers: Sequence[Any], vision: Tensor) -> Iterator[None]:
    """Vision tokens skip attention and MLP of these layers; text still sees them as they are.

    Args:
        layers: some of the decoder's, which runs them over all tokens (no policy that removes any).
        vision: bool `[B, T]`.
    """

    def keep(layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.where(vision[..., None], args[0], output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_vision(layer: DynamicLayer, track: Track) -> ScheduledLayer | ScheduledSlidingLayer:
    """A cache layer that holds only what `track` names of `layer`, which holds all; nothing else is copied."""
    assert track.head is not None and layer.keys is not None and layer.values is not None
    kind = SUPPORTED[type(layer)]
    held = kind.__new__(kind)
    held.__dict__.update(layer.__dict__)
    held.keys, held.values = layer.keys[:, :, track.head[0]], layer.values[:, :, track.head[0]]
    held.track = track
    return held


def same_cache(layers: Sequence[DynamicLayer]) -> DynamicCache:
    """A cache of these layers' entries that grows without touching them."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    cache.layers = [_fork(layer) for layer in layers]
    return cache


def _fork(layer: DynamicLayer) -> DynamicLayer:
    forked = type(layer).__new__(type(layer))
    forked.__dict__.update(layer.__dict__)  # `update` makes new tensors
    return forked
