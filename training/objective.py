"""The loss: cross-entropy on answer tokens, and KL to the teacher at the same positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from latefusion.data.collate import IGNORE, label_columns
from latefusion.models.attach import Attachment
from latefusion.models.inputs import fresh_inputs
from latefusion.models.policies.base import Policy
from latefusion.training.order import teacher_runs
from latefusion.training.step_cost import backward_ends, computed_flops
from latefusion.training.teacher import OtherTeacher
from latefusion.training.vision_tower import VisionTower


class Objective:
    """`(sum of cross-entropies + weight * temperature^2 * sum of KL(teacher || student)) / count`.

    With a `share` below 1 the teacher runs in some steps alone, and there its KL counts `1 / share` times. Whole steps,
    not samples: all processes and micro-batches of a step do the same, so the loss does not depend on how a step is
    divided, and a teacher in shards needs no agreement.

    The teacher is `model` itself with its adapters off, in eval mode, under `teacher`: one more forward pass, no second
    copy of any weight. Or it is `other`, a frozen model. `count` is the number of label tokens of the whole optimizer
    step, so the gradient does not depend on accumulation or on the number of processes.

    Args:
        model: the student, whose adapters `disable_adapter` turns off.
        attachment: of `model`, with the student's policy.
        teacher: the teacher's policy; None: cross-entropy alone.
        weight, temperature: of the KL term (Hinton et al., arXiv 1503.02531).
        share, seed: of the steps with a teacher (`order.teacher_runs`).
        share_images: encode images once for teacher and student; right if everything that trains comes after the
            projector.
        blank, sharded: as `VisionTower` has them.
        narrowing: the student's policy at a moment of the run (0 to 1); None: it stays the same.
        other: another model that teaches, under its own policy; None: `model` teaches itself.
        vocabulary: number of token ids that `other` scores too; None: all.

    Attributes:
        taught: the teacher runs in the step that `at` has set.
        by_label: each token's KL counts by the teacher's probability of its label (training/trust.py).
        counts: report the FLOPs of each call among its terms.
    """

    by_label = False
    counts = False

    def __init__(
        self,
        *,
        model: nn.Module,
        attachment: Attachment,
        teacher: Policy | None,
        weight: float,
        temperature: float,
        share_images: bool,
        share: float = 1.0,
        seed: int = 0,
        blank: Mapping[str, Any] | None = None,
        narrowing: Callable[[float], Policy] | None = None,
        other: OtherTeacher | None = None,
        vocabulary: int | None = None,
        sharded: bool = False,
    ):
        self.model: Any = model
        self.attachment = attachment
        self.narrowing = narrowing
        self.teacher = teacher if weight > 0 else None
        self.weight, self.temperature, self.share_images = weight, temperature, share_images
        self.share, self.seed = share, seed
        self.taught = teacher_runs(0, share=share, seed=seed)
        self.tower = VisionTower(model, blank=blank, sharded=sharded)
        self.other = other if self.teacher is not None else None
        self.vocabulary = vocabulary

    def __call__(
        self, forward: Callable[..., Any], batch: dict[str, Any], *, count: Tensor | int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch's share of the loss.

        Args:
            forward: the student, as the engine wraps it (DDP, DeepSpeed).
            batch: from the collator, with `labels` `[B, T]` and `queries` `[B, Q]`; with an offline teacher also
                `teacher_tokens` and `teacher_logprobs` `[N, k]`.
            count: label tokens in the whole optimizer step, over accumulation and processes.

        Returns:
            The loss, and sums over tokens: of its two terms, `ce` and `kl` (as of a teacher in every step), and the
            number of `tokens`; with a teacher also how many of them it scored, `taught`, and how many of these labels
            are its first choice, `teacher_right`.
        """
        inputs = dict(batch)
        offline_tokens, offline_logprobs = (
            inputs.pop("teacher_tokens", None),
            inputs.pop("teacher_logprobs", None),
        )
        labels, queries = inputs.pop("labels"), inputs.pop("queries")
        columns = label_columns(labels)  # [R]
        targets = labels[:, columns + 1]  # [B, R]
        learnt = targets != IGNORE  # bool [B, R]
        inputs.update(logits_to_keep=columns, use_cache=False)
        raw = inputs  # images not encoded: what another model's own tower takes
        if self.share_images:
            with torch.no_grad():
                inputs = self.tower.encode(inputs)
                if self.tower.needs_blank(raw):
                    self.tower.encode_blank(labels.device)

        with self.prompts_end(queries, labels != IGNORE):
            teacher_logits = None  # [N, V]
            if self.teacher is not None and self.taught:
                teacher_logits = self.teacher_logits(inputs if self.other is None else raw, learnt)
            teacher_flops = 0.0 if teacher_logits is None else self._teacher_flops(learnt.numel())
            zero = None
            if not self.share_images:
                inputs, zero = self.tower.run_first(inputs, labels.device)
            with self.tower.zero_added(zero):
                logits = forward(**fresh_inputs(inputs)).logits[learnt].float()  # [N, V]
        ce = F.cross_entropy(logits, targets[learnt], reduction="sum")
        kl = torch.zeros_like(ce)
        shared = logits[:, : self.vocabulary]
        label, weights = targets[learnt], None  # [N]
        choices = None  # [N], the teacher's
        if teacher_logits is not None:
            choices = teacher_logits.argmax(-1)
            if self.by_label:
                logprobs = (teacher_logits / self.temperature).log_softmax(-1)  # [N, V]
                weights = logprobs.gather(1, label[:, None])[:, 0].exp()
            kl = distillation(shared, teacher_logits, self.temperature, weights)
        elif self.weight > 0 and self.taught and offline_tokens is not None:
            choices = offline_tokens[:, 0]
            if self.by_label:  # 0 if the label is not among the kept tokens
                weights = (offline_logprobs.exp() * (offline_tokens == label[:, None])).sum(-1)
            kl = distillation_from(shared, offline_tokens, offline_logprobs, self.temperature, weights)
        loss = ce + self.weight / self.share * kl
        terms = {"ce": ce.detach(), "kl": kl.detach(), "tokens": learnt.sum()}
        if self.teacher is not None or (self.weight > 0 and offline_tokens is not None):
            right = choices == label if choices is not None else torch.zeros_like(label)
            terms |= {"taught": self.taught * learnt.sum(), "teacher_right": right.sum()}
        if self.counts:
            terms["flops"] = torch.tensor(
                teacher_flops + self._student_flops(learnt.numel()), device=ce.device
            )
        return loss / count, terms

    def at(self, step: int, steps: int) -> None:
        """Set what changes from step to step (from 0) of a run: whether the teacher runs, and the student's policy."""
        self.taught = teacher_runs(step, share=self.share, seed=self.seed)
        if self.narrowing is not None:
            self.attachment.policy = self.narrowing(step / steps)

    @torch.no_grad()
    def answers(self, batch: dict[str, Any]) -> Tensor:
        """The teacher's logits for each label of a batch, sample by sample, float32 `[N, V]`."""
        inputs = dict(batch)
        labels, queries = inputs.pop("labels"), inputs.pop("queries")
        columns = label_columns(labels)  # [R]
        inputs.update(logits_to_keep=columns, use_cache=False)
        with self.prompts_end(queries, labels != IGNORE):
            return self.teacher_logits(inputs, labels[:, columns + 1] != IGNORE)

    @torch.no_grad()
    def teacher_logits(self, inputs: dict[str, Any], learnt: Tensor) -> Tensor:
        """The teacher's logits at the positions `learnt` (bool `[B, R]`), float32 `[N, V]`."""
        if self.other is not None:
            # without autocast: in the dtype of its weights, as at inference
            with torch.autocast(learnt.device.type, enabled=False):
                if self.other.sharded:
                    tower = VisionTower(self.other.model, blank=self.tower.blank, sharded=self.tower.sharded)
                    inputs, _ = tower.run_first(inputs, learnt.device)
                return self.other.forward(**fresh_inputs(inputs)).logits[learnt][:, : self.vocabulary].float()
        training = self.model.training
        self.model.eval()
        try:
            with self.model.disable_adapter(), self.attachment.using(self.teacher):
                if not self.share_images:
                    inputs, _ = self.tower.run_first(inputs, learnt.device)
                return self.model(**fresh_inputs(inputs)).logits[learnt].float()
        finally:
            self.model.train(training)

    @contextmanager
    def prompts_end(self, queries: Tensor, answers: Tensor) -> Iterator[None]:
        """Tell the policies of student and teacher where the prompts end and which tokens are answers."""
        with ExitStack() as stack:
            for attachment in (self.attachment, self.other and self.other.attachment):
                if attachment is not None:
                    stack.enter_context(attachment.queries(queries, answers=answers))
            yield

    def _teacher_flops(self, scored: int) -> float:
        """FLOPs of the teacher's forward, which has just run; `scored` tokens went through the head."""
        if not self.counts:
            return 0.0
        model, attachment = (
            (self.model, self.attachment) if self.other is None else (self.other.model, self.other.attachment)
        )
        return float(computed_flops(attachment, model.config, scored))

    def _student_flops(self, scored: int) -> float:
        """FLOPs of the student's forward, which has just run, and of its backward pass.

        Backward takes as many as forward in the layers that it reaches; twice as many if the weights themselves train.
        What gradient checkpointing computes again does not count.
        """
        config, backward = self.model.config, 1 if isinstance(self.model, PeftModel) else 2
        forward = computed_flops(self.attachment, config, scored)
        first = backward_ends(self.model)
        return float(forward + backward * computed_flops(self.attachment, config, scored, first=first))


def distillation(
    logits: Tensor, teacher_logits: Tensor, temperature: float, weights: Tensor | None = None
) -> Tensor:
    """`temperature^2 * KL(softmax(teacher_logits / temperature) || softmax(logits / temperature))`, summed.

    Args:
        logits, teacher_logits: of student and teacher, `[N, V]`.
        weights: of the tokens in the sum, `[N]`; None: all 1.
    """
    student = F.log_softmax(logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    if weights is None:
        return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="sum")
    kl = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)  # [N]
    return temperature**2 * (weights * kl).sum()


def distillation_from(
    logits: Tensor, tokens: Tensor, logprobs: Tensor, temperature: float, weights: Tensor | None = None
) -> Tensor:
    """`distillation` from the teacher's likeliest tokens; the rest of the vocabulary counts as one.

    With the whole vocabulary it is `distillation`; with less it is a lower bound of it.

    Args:
        logits: of the student, `[N, V]`.
        tokens: int64 `[N, k]`; logprobs: of the teacher at them, at this temperature, `[N, k]`.
        weights: of the tokens in the sum, `[N]`; None: all 1.
    """
    student = F.log_softmax(logits / temperature, dim=-1)  # [N, V]
    at = student.gather(1, tokens)  # [N, k]
    terms = logprobs.exp() * (logprobs - at)
    scale = 1.0 if weights is None else weights[:, None]  # [N, 1]
    kl = (scale * terms.masked_fill(logprobs == float("-inf"), 0)).sum()
    if tokens.shape[1] < logits.shape[1]:
        others = student.scatter(1, tokens, float("-inf")).logsumexp(-1)  # [N]
        rest = 1 - logprobs.exp().sum(-1)  # [N]
        left = torch.where(rest > 0, torch.xlogy(rest, rest) - rest * others, 0.0)  # [N]
        kl = kl + (left if weights is None else weights * left).sum()
    return temperature**2 * kl
