"""One prefill under VisiPruner: which layer fuses, which tokens it keeps, when they leave.

What a token is worth to a layer is what removing it does to the attention output of the prompt's queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latefusion.models.policies.base import AttentionCall, Prompt, Selection
from latefusion.models.policies.ranking import on_device
from latefusion.models.policies.visipruner.rules import Rules
from latefusion.models.policies.visipruner.shallow import ShallowRule


class VisiPrunerDecision:
    """VisiPruner's choice of vision tokens for one prefill, made layer by layer.

    What a layer finds stays on the device until it could change what a later layer computes: before fusion
    after every layer, then when enough layers have passed. Only then are four integers a sample and layer
    sent to the host, and awaited only before the next layer, so that the rest of the layer is queued meanwhile.
    Once all samples are settled, no layer is looked at.

    Attributes:
        kept: bool `[B, T]`, the vision tokens that still take part.
        prunable: bool `[B, T]`, those that may be removed.
        fusion_layer: per sample, the layer that chose them, or None.
    """

    def __init__(self, rules: Rules, prompt: Prompt):
        self.rules, self.prompt = rules, prompt
        self.kept = prompt.vision  # [B, T]
        self._counts = list(prompt.n_vision)
        self._fusion: list[int | None] = [None] * len(self._counts)
        self._passed = [0] * len(self._counts)  # layers that no longer used vision
        self._findings: list[_Finding] = []  # not settled yet
        self._numbers: _OnTheWay | None = None  # the same on their way to the host

        shallow = range(min(rules.boundary, prompt.num_layers)) if "shallow" in rules.stages else range(0)
        middle = range(rules.boundary + 1, prompt.num_layers) if "middle" in rules.stages else range(0)
        self.watch = set(prompt.attending([*shallow, *middle]))

        self.prunable = prunable(prompt)
        self._left_whole = [False] * len(self._counts)  # nothing of it may be removed
        self._without_vision = ShallowRule(prompt, rules.sink_rule)

    @property
    def fusion_layer(self) -> list[int | None]:
        self._settle()
        return self._fusion

    def select(self, layer: int) -> Selection | None:
        if self._numbers is None:
            return None
        return Selection(self.kept, tuple(self._counts)) if self._settle() else None

    def attended(self, layer: int, call: AttentionCall) -> Tensor | None:
        if layer < self.rules.boundary:
            return self._without_vision(layer, call)
        self._look(layer, call)
        return None

    @torch.no_grad()
    def _look(self, layer: int, call: AttentionCall) -> None:
        self._add(layer, *self.judge(layer, *effect_on_queries(call, self.prompt)))

    def judge(self, layer: int, cosine: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Judge a layer by its removal effects, float32 `[B, T]` each.

        Returns:
            The critical tokens, bool `[B, T]`; per sample, bool `[B]`: whether the layer fuses, and whether it
            uses tokens that were kept.
        """
        rules = self.rules
        critical = (norm > rules.tokens_threshold) & self.prunable
        fuses = ((cosine < rules.layer_threshold) & self.prunable).any(1)
        return critical, fuses, ((cosine < rules.exit_threshold) & self.kept).any(1)

    def fuse(self, layer: int, critical: Tensor) -> None:
        """Record `layer` as the fusion layer of all samples, with these critical tokens (bool `[B, T]`)."""
        everywhere = torch.ones_like(critical[:, 0])  # [B]
        self._add(layer, critical, everywhere, everywhere)

    def _add(self, layer: int, critical: Tensor, fuses: Tensor, used: Tensor) -> None:
        numbers = torch.stack((fuses, used, self.prunable.any(1), critical.sum(1)), dim=1)  # [B, 4]
        self._findings.append(_Finding(layer, critical, numbers))
        if layer < self.prompt.num_layers - 1 and self._could_change():
            self._numbers = _OnTheWay([finding.numbers for finding in self._findings])

    def _could_change(self) -> bool:
        """Whether what was found since the host last knew could change what the next layer computes."""
        needed = self.rules.exit_patience - len(self._findings)
        return any(
            self._fusion[i] is None or self._passed[i] >= needed
            for i in range(len(self._counts))
            if not self._is_settled(i)
        )

    def _settle(self) -> bool:
        """Turn what was found into each sample's next tokens; true if any of them changed."""
        if not self._findings:
            return False
        numbers = self._numbers or _OnTheWay([finding.numbers for finding in self._findings])
        changed = [
            self._apply(finding, rows)
            for finding, rows in zip(self._findings, numbers.on_host(), strict=True)
        ]
        self._findings, self._numbers = [], None
        if all(self._is_settled(i) for i in range(len(self._counts))):
            self.watch.clear()
        return any(changed)

    def _apply(self, finding: _Finding, rows: list[list[int]]) -> bool:
        fused, left = [False] * len(rows), [False] * len(rows)
        for i, (fuses, used, may, count) in enumerate(rows):
            self._left_whole[i] = not may
            if self._fusion[i] is None:
                if fuses:
                    self._fusion[i], self._counts[i], fused[i] = finding.layer, count, True
            elif self._counts[i] and "deep" in self.rules.stages:
                self._passed[i] += not used
                if self._passed[i] >= self.rules.exit_patience:
                    self._counts[i], left[i] = 0, True
        device = self.kept.device
        if any(fused):
            self.kept = torch.where(on_device(fused, device)[:, None], finding.critical, self.kept)
        if any(left):
            self.kept = self.kept & ~on_device(left, device)[:, None]
        return any(fused) or any(left)

    def _is_settled(self, sample: int) -> bool:
        fused = self._fusion[sample] is not None
        done = fused and "deep" not in self.rules.stages
        return done or self._counts[sample] == 0 or self._left_whole[sample]


@dataclass(frozen=True)
class _Finding:
    """A layer's verdict on each sample, on the device.

    Attributes:
        critical: bool `[B, T]`.
        numbers: int64 `[B, 4]`: it fuses, it uses kept tokens, any token may be removed, critical tokens.
    """

    layer: int
    critical: Tensor
    numbers: Tensor


class _OnTheWay:
    """Layers' numbers `[B, 4]`, on their way to the host; the host waits when it asks for them."""

    def __init__(self, numbers: list[Tensor]):
        together = torch.stack(numbers)  # [layers, B, 4]
        self._numbers = together.to("cpu", non_blocking=True)  # pinned memory if it comes from a GPU
        self._copied = torch.cuda.current_stream(together.device).record_event() if together.is_cuda else None

    def on_host(self) -> list[list[list[int]]]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()


def prunable(prompt: Prompt) -> Tensor:
    """The vision tokens that may be removed, bool `[B, T]`: none of a prompt that ends in one."""
    ends_in_vision = prompt.vision.gather(1, prompt.queries).any(1, keepdim=True)  # [B, 1]
    return prompt.vision & ~ends_in_vision


def effect_on_queries(call: AttentionCall, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """`removal_effect` of each token on the prompt's queries, float32 `[B, T]` each: least cosine, largest norm."""
    length = prompt.vision.shape[1]
    cosine, norm = removal_effect(call.weights(call.compact_rows(prompt.queries)), call.value)
    return call.to_logical(cosine.amin(1), length, fill=1.0), call.to_logical(norm.amax(1), length)


def removal_effect(weights: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What each key gives to a query row: cosine of the output without it to the output, and its norm.

    With `o` the row's output (heads concatenated, before o_proj) and `c_i` the concatenation over heads of
    `a[h, i] * v[h, i]`: `cos(o - c_i, o)` and `||c_i||_2`. No contribution is materialised: with
    `d_i = <o, c_i>` the cosine is `(|o|^2 - d_i) / (|o| sqrt(|o|^2 - 2 d_i + |c_i|^2))`.

    Args:
        weights: attention probabilities, float32 `[B, H, R, K]`.
        value: `[B, Hkv, K, D]`, any floating dtype; head h reads value head `h // (H / Hkv)`.

    Returns:
        Cosine and norm, float32 `[B, R, K]`. An output shrunk below a thousandth counts as a thousandth.
    """
    value = value.float()
    grouped = weights.unflatten(1, (value.shape[1], -1))  # [B, Hkv, G, R, K]
    output = grouped @ value[:, :, None]  # [B, Hkv, G, R, D]
    dot = (grouped * (output @ value[:, :, None].mT)).sum((1, 2))  # [B, R, K]
    norm_sq = (grouped.square() * value.square().sum(-1)[:, :, None, None]).sum((1, 2))  # [B, R, K]
    total = output.square().sum((1, 2, 4))[..., None]  # [B, R, 1]
    rest = (total - 2 * dot + norm_sq).clamp(min=1e-6 * total)
    cosine = (total - dot) / (total * rest).sqrt()
    return cosine, norm_sq.sqrt()
