"""Every setting of VisiPruner on the same prompts, for the price of a few prefills.

Up to its fusion layer a prompt runs dense (or under the shallow rule alone), whatever the thresholds. So one
recorded prefill says for every layer by how much removing a vision token turns the last prompt token, and with
it where each `(boundary, layer_threshold)` fuses and what each `tokens_threshold` keeps. What follows depends
on the fusion layer and the kept tokens only; it is computed once for each, from the recorded hidden states of
the layer after fusion on, over the few tokens that are left.

A setting is judged on the dense model's own greedy answer, which stands in the same forward after its prompt
(teacher forcing): it sees there what it would see when decoded token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from latefusion.models.attach import Attachment
from latefusion.models.executor.partial import starting_at
from latefusion.models.flops import decoder_flops
from latefusion.models.inputs import fresh_inputs
from latefusion.models.policies.base import AttentionCall, Prompt, Selection
from latefusion.models.policies.visipruner.decision import VisiPrunerDecision, effect_on_queries, prunable
from latefusion.models.policies.visipruner.settings import VisiPruner


@dataclass(frozen=True)
class Batch:
    """Prompts with an answer behind each.

    Attributes:
        inputs: of the model's forward; images as features.
        answers: int64 `[B, A]`; real: bool `[B, A]`, false after an answer's end.
    """

    inputs: dict[str, Any]
    answers: Tensor
    real: Tensor

    @classmethod
    def build(cls, model: Any, inputs: dict[str, Any], answers: Sequence[Sequence[int]]) -> Batch:
        """`inputs` are prompts padded on the left, their images encoded."""
        device, longest = inputs["input_ids"].device, max(map(len, answers))
        ids = torch.zeros(len(answers), longest, dtype=torch.long)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for row, answer in enumerate(answers):
            ids[row, : len(answer)], real[row, : len(answer)] = torch.tensor(answer), True
        ids, real = ids.to(device), real.to(device)
        longer = dict(inputs)
        longer["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
        longer["attention_mask"] = torch.cat([inputs["attention_mask"], real.long()], 1)
        suffix = int(model.config.model_type == "paligemma")  # whose answers are causal, its prompts not
        for name, kind in (("token_type_ids", suffix), ("mm_token_type_ids", 0)):
            if name in inputs:
                longer[name] = pad(inputs[name], (0, longest), value=kind)
        return cls(longer, ids, real)

    @property
    def last(self) -> int:
        """Column of the last prompt token."""
        return self.inputs["input_ids"].shape[1] - self.answers.shape[1] - 1

    def logits(self, attachment: Attachment) -> Tensor:
        """Logits before each answer token, float32 `[B, A, V]`."""
        queries = torch.full_like(self.answers[:, :1], self.last)
        with attachment.queries(queries), torch.no_grad():
            out = attachment.model(
                **fresh_inputs(self.inputs),
                logits_to_keep=self.answers.shape[1] + 1,
                use_cache=False,
            )
        return out.logits[:, :-1].float()


@dataclass(frozen=True)
class Outcome:
    """How a setting changes each prompt of a batch, `[B]` each.

    Attributes:
        kl: KL(dense || pruned), nats, mean over the answer's tokens.
        same: greedy decoding gives the answer.
        flops: of the decoder, for prefilling the prompt.
        vision: vision tokens a layer, mean over layers.
    """

    kl: NDArray[np.float64]
    same: NDArray[np.bool_]
    flops: NDArray[np.float64]
    vision: NDArray[np.float64]

    def where(self, rows: NDArray[np.bool_], other: Outcome) -> Outcome:
        """This outcome in `rows`, the other elsewhere."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Outcome(*(np.where(rows, here, there) for here, there in pairs))


@dataclass(frozen=True)
class Recorded:
    """A prefill that removes nothing.

    Attributes:
        logits: float32 `[B, A, V]`.
        states: hidden states that enter each layer, `[B, T, D]` each.
        least: each layer's least cosine, `[layers, B]`.
        norms: each layer's contribution norms, float32 `[B, T]`, -1 where a token may not be removed.
    """

    logits: Tensor
    states: list[Tensor]
    least: NDArray[np.float64]
    norms: list[Tensor]


def surveyed(recorded: Recorded, tokens_thresholds: Sequence[float]) -> dict[str, Any]:
    """Each layer's least cosine `[layers, B]`, and how many tokens it would keep, `[layers, thresholds, B]`."""
    kept = [
        [(norms > threshold).sum(1).cpu().numpy() for threshold in tokens_thresholds]
        for norms in recorded.norms
    ]
    return {"least": recorded.least, "kept": np.array(kept)}


def fusion_layers(least: NDArray, boundary: int, layer_threshold: float) -> NDArray:
    """Each prompt's fusion layer, the number of layers if it never fuses; `least` is `[layers, B]`."""
    fuses = least < layer_threshold
    fuses[: boundary + 1] = False
    return np.where(fuses.any(0), fuses.argmax(0), len(fuses))


def record(batch: Batch, attachment: Attachment, boundary: int, sink_rule: str) -> Recorded:
    """Run a batch once, dense, or with the shallow rule below `boundary` if that is above 0."""
    policy, states = _Recording(boundary, sink_rule), dict[int, Tensor]()
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: states.update({i: args[0]}), with_kwargs=True
        )
        for i, layer in enumerate(attachment.layers)
    ]
    try:
        with attachment.using(policy):
            logits = batch.logits(attachment)
    finally:
        for handle in handles:
            handle.remove()
    decision = policy.decision
    assert decision is not None
    least = torch.stack(decision.least).double().cpu().numpy()
    return Recorded(logits, [states[i] for i in range(len(states))], least, decision.norms)


def resume(
    batch: Batch, attachment: Attachment, recorded: Recorded, fusion: int, policy: VisiPruner
) -> Tensor:
    """The logits `[B, A, V]` if all prompts fuse in layer `fusion` under `policy`, from the layer after it on."""
    critical = recorded.norms[fusion] > policy.tokens_threshold
    with (
        attachment.using(_Resumed(policy, fusion, critical)),
        starting_at(attachment.layers, fusion + 1, recorded.states[fusion + 1]),
    ):
        return batch.logits(attachment)


def judge(batch: Batch, attachment: Attachment, logits: Tensor, dense: Tensor) -> Outcome:
    """Distance of `logits` from the dense ones, and what the last prefill of `attachment` computed."""
    real = batch.real
    pruned, stock = logits.log_softmax(-1), dense.log_softmax(-1)  # [B, A, V]
    kl = (stock.exp() * (stock - pruned)).sum(-1).masked_fill(~real, 0).sum(1) / real.sum(1)
    same = ((logits.argmax(-1) == batch.answers) | ~real).all(1)
    trace, answers = attachment.trace, real.sum(1).tolist()
    prompts = [
        [n - answer for n in record.tokens] for record, answer in zip(trace, answers, strict=True)
    ]  # [B, layers]
    flops = [decoder_flops(attachment.model.config, layers) for layers in prompts]
    vision = [np.mean(record.vision) for record in trace]
    return Outcome(
        kl.double().clamp(min=0).cpu().numpy(),
        same.cpu().numpy(),
        np.array(flops, float),
        np.array(vision, float),
    )


class _Recording:
    """A policy that removes nothing and looks at every layer; `decision` is that of the last prefill."""

    def __init__(self, boundary: int, sink_rule: str):
        self.shallow = None
        if boundary > 0:
            self.shallow = VisiPruner(boundary=boundary, stages=("shallow",), sink_rule=sink_rule)
        self.decision: _RecordingDecision | None = None

    def validate(self, num_layers: int) -> None:
        if self.shallow is not None:
            self.shallow.validate(num_layers)

    def begin(self, prompt: Prompt) -> _RecordingDecision:
        self.decision = _RecordingDecision(prompt, self.shallow)
        return self.decision


class _RecordingDecision:
    fusion_layer = None

    def __init__(self, prompt: Prompt, shallow: VisiPruner | None):
        self.prompt, self.prunable = prompt, prunable(prompt)
        self.watch = set(range(prompt.num_layers))
        self.shallow = None if shallow is None else shallow.begin(prompt)
        self.least: list[Tensor] = []
        self.norms: list[Tensor] = []

    def select(self, layer: int) -> Selection | None:
        return None

    @torch.no_grad()
    def attended(self, layer: int, call: AttentionCall) -> Tensor | None:
        cosine, norm = effect_on_queries(call, self.prompt)
        self.least.append(cosine.masked_fill(~self.prunable, float("inf")).amin(1))
        self.norms.append(norm.masked_fill(~self.prunable, -1.0))
        if self.shallow is None or layer not in self.shallow.watch:
            return None
        return self.shallow.attended(layer, call)


class _Resumed:
    """`policy`, with the fusion layer and its critical tokens (bool `[B, T]`) given."""

    def __init__(self, policy: VisiPruner, fusion: int, critical: Tensor):
        self.policy, self.fusion, self.critical = policy, fusion, critical

    def validate(self, num_layers: int) -> None:
        self.policy.validate(num_layers)

    def begin(self, prompt: Prompt) -> VisiPrunerDecision:
        return _ResumedDecision(self, prompt)


class _ResumedDecision(VisiPrunerDecision):
    def __init__(self, resumed: _Resumed, prompt: Prompt):
        super().__init__(resumed.policy, prompt)
        self.first = resumed.fusion + 1
        self.fuse(resumed.fusion, resumed.critical)

    def select(self, layer: int) -> Selection | None:
        return None if layer < self.first else super().select(layer)
