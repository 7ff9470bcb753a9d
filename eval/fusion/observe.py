"""What the dense model's own attention says, layer by layer: how the last prompt token looks at vision tokens.

It is shown beside the knock-outs because it is not the same: a token may draw attention and give nothing (a sink).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from latefusion.models.policies.base import AttentionCall, Prompt
from latefusion.models.policies.visipruner.decision import removal_effect

MASS = 0.9  # of the attention on vision
QUANTILES = (0.01, 0.1, 0.5)


@dataclass(frozen=True)
class Look:
    """One layer's attention of one sample's last prompt token, to the K vision tokens.

    Attributes:
        share: of its attention, mean over heads, that falls on vision tokens (FastV, arXiv 2403.06764).
        entropy: of that attention among vision tokens, nats; log K if it is even, 0 if none falls on vision (which
            local attention may not reach).
        tokens: the fewest vision tokens that 90% of it falls on; 0 if none falls on vision.
        sink: Spearman's correlation of attention received with the L1 norm of the value vector (mean over heads).
            Attention sinks have small values (arXiv 2309.17453, 2510.17205): a negative number.
        cosine: VisiPruner's removal cosine (arXiv 2510.17205), minimum and 1%, 10%, 50% quantiles over vision tokens:
            between the attention output (heads concatenated, before o_proj) and the same without one token.
        norm: l2 norm of a token's contribution to that output: maximum, and 99%, 90%, 50% quantiles.
    """

    share: float
    entropy: float
    tokens: int
    sink: float
    cosine: list[float]
    norm: list[float]


@dataclass
class Watch:
    """A policy that removes nothing and keeps what it sees.

    Attributes:
        looks: per layer, per sample.
        attention: per layer `[B, T]`, attention of the last prompt token, mean over heads.
        values: per layer `[B, T]`, L1 norm of the value vectors, mean over heads.
        heads: per layer `[B, H, D]`, each head's output for the last prompt token, before o_proj.
    """

    looks: list[list[Look]] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)

    def validate(self, num_layers: int) -> None:
        return None

    def begin(self, prompt: Prompt) -> _Watching:
        return _Watching(self, prompt)


class _Watching:
    fusion_layer = None

    def __init__(self, watch: Watch, prompt: Prompt):
        self.into, self.prompt = watch, prompt
        self.watch = range(prompt.num_layers)

    def select(self, layer: int) -> None:
        return None

    @torch.no_grad()
    def attended(self, layer: int, call: AttentionCall) -> None:
        prompt, length = self.prompt, self.prompt.vision.shape[1]
        weights = call.weights(call.compact_rows(prompt.queries[:, :1]))  # [B, H, 1, K]
        cosine, norm = removal_effect(weights, call.value)  # [B, 1, K]
        grouped = weights.unflatten(1, (call.value.shape[1], -1))
        output = (grouped @ call.value.float()[:, :, None]).flatten(1, 2)[:, :, 0]  # [B, H, D]
        attention = call.to_logical(weights[:, :, 0].mean(1), length)  # [B, T]
        values = call.to_logical(call.value.float().abs().sum(-1).mean(1), length)
        cosine, norm = call.to_logical(cosine[:, 0], length, fill=1.0), call.to_logical(norm[:, 0], length)
        self.into.looks.append(
            [
                look(attention[i][seen], values[i][seen], cosine[i][seen], norm[i][seen])
                for i, seen in enumerate(prompt.vision)
            ]
        )
        self.into.attention.append(attention)
        self.into.values.append(values)
        self.into.heads.append(output)
        return None


def look(attention: Tensor, values: Tensor, cosine: Tensor, norm: Tensor) -> Look:
    """Args: attention, L1 norm of the values, removal cosine and l2 norm of a sample's vision tokens, `[K]` each."""
    share = attention.sum()
    p = (attention / share).double() if share > 0 else torch.zeros_like(attention).double()
    ranked = p.sort(descending=True).values.cumsum(0)
    levels = torch.tensor(QUANTILES, dtype=cosine.dtype, device=cosine.device)
    flat = len(attention) < 3 or bool((attention == attention[0]).all()) or bool((values == values[0]).all())
    sink: Any = 0.0 if flat else spearmanr(attention.cpu(), values.cpu()).statistic
    return Look(
        share=float(share),
        entropy=float(torch.special.entr(p).sum()),
        tokens=int((ranked < MASS).sum()) + 1 if share > 0 else 0,
        sink=float(sink),
        cosine=[float(cosine.min()), *cosine.quantile(levels).tolist()],
        norm=[float(norm.max()), *norm.quantile(1 - levels).tolist()],
    )


def fusion_layer(looks: list[Look], threshold: float) -> int | None:
    """The first layer where removing some vision token turns the output: VisiPruner's fusion layer, of one sample."""
    return next((layer for layer, found in enumerate(looks) if found.cosine[0] < threshold), None)
