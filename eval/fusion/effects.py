"""What a model answers, and what a change of the model does to its answers: KL and correctness of each sample."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from latefusion.data.collate import IGNORE
from latefusion.data.prompt_batches import Batch


@dataclass(frozen=True)
class Effect:
    """The effect of one change of the model on each sample of a batch.

    Attributes:
        kl: KL(dense || changed) of the next-token distributions in nats, mean over the sample's answer tokens.
        right: whether the likeliest token is the label at every answer token (what greedy decoding would write).
    """

    kl: list[float]
    right: list[bool]


@dataclass(frozen=True)
class Answers:
    """Log-probabilities at the N answer tokens of a batch, and the labels that they are judged by.

    Attributes:
        log_probs: float32 `[N, V]`.
        targets: int64 `[N]`.
        sample: the sample of each token, int64 `[N]`.
    """

    log_probs: Tensor
    targets: Tensor
    sample: Tensor

    @classmethod
    def of(cls, batch: Batch, logits: Tensor, columns: Tensor) -> Answers:
        """The answers that `logits` `[B, R, V]` at the positions `columns` `[R]` give."""
        targets = batch.labels[:, columns + 1]  # [B, R]
        learnt = targets != IGNORE
        sample = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
        return cls(F.log_softmax(logits[learnt].float(), -1), targets[learnt], sample[learnt])

    def to(self, device: torch.device | str) -> Answers:
        return Answers(self.log_probs.to(device), self.targets.to(device), self.sample.to(device))

    def effect(self, changed: Answers) -> Effect:
        """The effect of the change that turned these answers into `changed`.

        Raises:
            ValueError: the changed answers are not finite.
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
        tokens = zero.index_add(0, self.sample, torch.ones_like(kl, dtype=torch.float64))
        mean = zero.index_add(0, self.sample, kl.clamp(min=0).double()) / tokens
        errors = zero.index_add(0, self.sample, wrong.double())
        return Effect(mean.tolist(), (errors == 0).tolist())


def upper_limit(values: Sequence[float], images: Sequence[Hashable] | None = None) -> float:
    """A one-sided 95% upper limit of the mean over prompts, corrected for their skewness.

    A few prompts hold a third of all KL, so a sample that misses them has a small mean and a small error at once, and
    Student's limit is too low. Johnson's modified t (JASA 73, 1978) adds what the third moment says.

    Args:
        values: one a prompt; images: what each prompt is about, if prompts share images (see `interval`).
    """
    if images is not None:
        return max(upper_limit(values), upper_limit(by_image(values, images)))
    n = len(values)
    if n < 2:
        return float("inf")
    t = float(stats.t.ppf(0.95, n - 1))
    skewness = float(stats.skew(values, bias=False)) if n > 2 and np.ptp(values) > 0 else 0.0
    return float(np.mean(values) + stats.sem(values) * (t + skewness * (1 + 2 * t * t) / (6 * n**0.5)))


def by_image(values: Sequence[float], images: Sequence[Hashable]) -> list[float]:
    """One number an image, whose mean is that of the values and whose spread is that of whole images."""
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(image, len(numbers)) for image in images]
    mean = float(np.mean(values))
    shares = np.bincount(index, np.asarray(values) - mean, len(numbers)) / len(values)
    return (mean + len(numbers) * shares).tolist()


def interval(values: Sequence[float], images: Sequence[Hashable] | None = None) -> tuple[float, float, float]:
    """Mean with its 95% interval over samples (Student's t; never below 0).

    Args:
        values: one a sample; images: what each sample is about. Samples about one image are not independent: the
            interval is the wider one of that over samples and that over images. None: no two share an image.
    """
    mean = float(np.mean(values))
    if images is not None:
        ends = [interval(values), interval(by_image(values, images))]
        return mean, min(low for _, low, _ in ends), max(high for _, _, high in ends)
    if len(values) < 2:
        return mean, 0.0, float("inf")
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return mean, max(0.0, mean - half), mean + half
