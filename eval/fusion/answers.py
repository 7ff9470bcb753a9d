"""What a model says where an answer is due, and what a change of the model did to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latefusion.data.prompt_batches import Batch


@dataclass(frozen=True)
class Effect:
    """What one change did to each sample of a batch.

    Attributes:
        kl: nats, KL(dense || changed) of the next-token distributions, mean over the sample's answer tokens.
        right: whether the likeliest token is the label at every answer token (what greedy decoding would write).
    """

    kl: list[float]
    right: list[bool]


@dataclass(frozen=True)
class Answers:
    """Log-probabilities at a batch's answer tokens, float32 `[N, V]`, and the labels `[N]` they are judged by."""

    log_probs: Tensor
    targets: Tensor
    sample: Tensor  # int64 [N]

    @classmethod
    def of(cls, batch: Batch, logits: Tensor, columns: Tensor) -> Answers:
        """Args: logits `[B, R, V]` of the positions `columns` `[R]`."""
        targets = batch.labels[:, columns + 1]  # [B, R]
        learnt = targets != -100
        sample = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
        return cls(F.log_softmax(logits[learnt].float(), -1), targets[learnt], sample[learnt])

    def to(self, device: torch.device | str) -> Answers:
        return Answers(self.log_probs.to(device), self.targets.to(device), self.sample.to(device))

    def effect(self, changed: Answers) -> Effect:
        """What turned these answers into `changed`.

        Raises:
            ValueError: those are no numbers.
        """
        if not bool(changed.log_probs.isfinite().all()):
            raise ValueError(
                "the model's logits are not finite once some of its layers do not see the image; load it with "
                "dtype=float32."
            )
        kl = F.kl_div(changed.log_probs, self.log_probs, log_target=True, reduction="none").sum(-1)  # [N]
        wrong = changed.log_probs.argmax(-1) != self.targets
        n = int(self.sample.max()) + 1
        zero = torch.zeros(n, dtype=torch.float64, device=kl.device)
        count = zero.index_add(0, self.sample, torch.ones_like(kl, dtype=torch.float64))
        mean = zero.index_add(0, self.sample, kl.clamp(min=0).double()) / count
        errors = zero.index_add(0, self.sample, wrong.double())
        return Effect(mean.tolist(), (errors == 0).tolist())
