"""The loss: cross-entropy on answer tokens, and KL to the teacher at the same positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from latefusion.data.collate import IGNORE, label_columns
from latefusion.models.attach import Attachment
from latefusion.models.inputs import fresh_inputs, unwrapped
from latefusion.models.policies.base import Policy
from latefusion.training.loss import Read, Teaching, Terms, answer_loss
from latefusion.training.order import teacher_runs
from latefusion.training.readout import Readout
from latefusion.training.step_cost import backward_ends, computed_flops
from latefusion.training.teacher import OtherTeacher
from latefusion.training.vision_tower import VisionTower


@dataclass(kw_only=True)
class Distillation:
    """How a teacher takes part in the loss.

    Attributes:
        policy: under which the teacher runs; None: none runs (its answers come with the batch, or nobody teaches).
        weight, temperature: of the KL term (Hinton et al., arXiv 1503.02531); weight 0: cross-entropy alone.
        share, seed: of the steps with a teacher (`order.teacher_runs`).
        other: another model that teaches; None: the student's base does.
        vocabulary: number of token ids that `other` scores too; None: all.
    """

    policy: Policy | None
    weight: float = 1.0
    temperature: float = 1.0
    share: float = 1.0
    seed: int = 0
    other: OtherTeacher | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if self.weight == 0:
            self.policy = None
        if self.policy is None:
            self.other = None


class Objective:
    """`(sum of cross-entropies + weight * temperature^2 * sum of KL(teacher || student)) / count`.

    With a `kl.share` below 1 the teacher runs in some steps alone, and there its KL counts `1 / share` times. Whole
    steps, not samples: all processes and micro-batches of a step do the same, so the loss does not depend on how a step
    is divided, and a teacher in shards needs no agreement.

    The teacher is `model` itself with its adapters off, in eval mode, under `kl.policy`: one more forward pass, no
    second copy of any weight. Or it is `kl.other`, a frozen model. `count` is the number of label tokens of the whole
    optimizer step, so the gradient does not depend on accumulation or on the number of processes.

    Args:
        model: the student, whose adapters `disable_adapter` turns off.
        attachment: of `model`, with the student's policy.
        kl: how a teacher takes part.
        share_images: encode images once for teacher and student; right if everything that trains comes after the
            projector.
        blank, sharded: as `VisionTower` has them.
        narrowing: the student's policy at a moment of the run (0 to 1); None: it stays the same.

    Attributes:
        taught: the teacher runs in the step that `at` has set.
        counts: report the FLOPs of each call among its terms.
    """

    counts = False

    def __init__(
        self,
        *,
        model: nn.Module,
        attachment: Attachment,
        kl: Distillation,
        share_images: bool,
        blank: Mapping[str, Any] | None = None,
        narrowing: Callable[[float], Policy] | None = None,
        sharded: bool = False,
    ):
        self.model: Any = model
        self.attachment, self.kl = attachment, kl
        self.share_images, self.narrowing = share_images, narrowing
        self.taught = teacher_runs(0, share=kl.share, seed=kl.seed)
        self.tower = VisionTower(model, blank=blank, sharded=sharded)
        self.readout = Readout(unwrapped(model), sharded=sharded)
        self._others_readout = None if kl.other is None else Readout(kl.other.model)
        self.width = self.readout.model.config.get_text_config().vocab_size

    def __call__(
        self, forward: Callable[..., Any], batch: dict[str, Any], *, count: Tensor | int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch's share of the loss.

        Args:
            forward: the student, as the engine wraps it (DDP, DeepSpeed).
            batch: from the collator, with `labels` `[B, T]` and `queries` `[B, Q]`; packed also `samples` `[B, T]`;
                with an offline teacher also `teacher_tokens` and `teacher_logprobs` `[N, k]`.
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
        labels, queries, samples = inputs.pop("labels"), inputs.pop("queries"), inputs.pop("samples", None)
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

        label, sums = targets[learnt], Terms(labels.device)  # [N]
        weight, cached, taught = self.kl.weight / self.kl.share, None, None
        if self.kl.weight > 0 and self.taught and offline_tokens is not None:
            cached = {"tokens": offline_tokens, "logprobs": offline_logprobs}
        with self.prompts_end(queries, labels != IGNORE, samples):
            if self.kl.policy is not None and self.taught:
                cached, taught = None, self.teacher_rows(inputs if self.kl.other is None else raw, learnt)
            teacher_flops = 0.0 if taught is None else self._teacher_flops(len(label))
            zero = None
            if not self.share_images:
                inputs, zero = self.tower.run_first(inputs, labels.device)

            def loss_of(rows: Tensor, read: Read, trained: Sequence[Tensor] = ()) -> Tensor:
                says: Any = cached if taught is None else {"rows": taught[0], "read": taught[1](read)}
                teaching = None
                if says is not None:
                    kl = self.kl
                    teaching = Teaching(**says, temperature=kl.temperature, vocabulary=kl.vocabulary)
                return answer_loss(
                    rows, label, read, teaching, sums, weight=weight, width=self.width, trained=trained
                )

            with self.tower.zero_added(zero):
                loss = self._student(forward, fresh_inputs(inputs), learnt, loss_of)
        terms = {"ce": sums.ce, "kl": sums.kl, "tokens": learnt.sum()}
        if self.kl.policy is not None or (self.kl.weight > 0 and offline_tokens is not None):
            terms |= {"taught": self.taught * learnt.sum(), "teacher_right": sums.right}
        if self.counts:
            flops = teacher_flops + self._student_flops(len(label))
            terms["flops"] = torch.tensor(flops, device=loss.device)
        return loss / count, terms

    def _student(
        self,
        forward: Callable[..., Any],
        inputs: dict[str, Any],
        learnt: Tensor,
        loss_of: Callable[..., Tensor],
    ) -> Tensor:
        """`loss_of(rows, read, trained)`, computed inside the student's forward, where its output head would run."""
        readout = self.readout
        if not readout.splits:
            return loss_of(forward(**inputs).logits[learnt], _as_it_is)

        def use(rows: Tensor) -> dict[str, Tensor]:
            return {"loss": readout.call_head(rows, lambda rows, read: loss_of(rows, read, readout.weights))}

        with readout.ending_before_head(learnt, use):
            return forward(**inputs)["loss"]

    def at(self, step: int, steps: int) -> None:
        """Set what changes from step to step (from 0) of a run: whether the teacher runs, and the student's policy."""
        self.taught = teacher_runs(step, share=self.kl.share, seed=self.kl.seed)
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
            rows, reading = self.teacher_rows(inputs, labels[:, columns + 1] != IGNORE)
        if self.kl.other is not None or not self.readout.splits:
            logits = reading(_as_it_is)(rows)
        else:
            logits = self.readout.call_head(rows, lambda rows, read: reading(read)(rows))
        return logits[:, : self.kl.vocabulary].float()

    @torch.no_grad()
    def teacher_rows(self, inputs: dict[str, Any], learnt: Tensor) -> tuple[Tensor, Callable[[Read], Read]]:
        """What the teacher's output head gets at the positions `learnt` (bool `[B, R]`), `[N, D]`.

        Where its head cannot run apart from its forward, the logits `[N, V]`.

        Returns:
            The rows, and a function that makes the way from them to logits of the student's.
        """
        other = self.kl.other
        if other is not None:
            # without autocast: in the dtype of its weights, as at inference
            with torch.autocast(learnt.device.type, enabled=False):
                if other.sharded:
                    tower = VisionTower(other.model, blank=self.tower.blank, sharded=self.tower.sharded)
                    inputs, _ = tower.run_first(inputs, learnt.device)
                readout = self._others_readout
                if readout is None or other.sharded:  # its head's weights are gone once its forward has ended
                    return other.forward(**fresh_inputs(inputs)).logits[learnt], lambda read: _as_it_is
                with readout.ending_before_head(learnt, _as_it_is):
                    return other.forward(**fresh_inputs(inputs)), lambda read: readout.read
        training = self.model.training
        self.model.eval()
        try:
            with self.model.disable_adapter(), self.attachment.using(self.kl.policy):
                if not self.share_images:
                    inputs, _ = self.tower.run_first(inputs, learnt.device)
                if not self.readout.splits:
                    return self.model(**fresh_inputs(inputs)).logits[learnt], lambda read: read
                with self.readout.ending_before_head(learnt, _as_it_is):
                    return self.model(**fresh_inputs(inputs)), self.readout.of_base
        finally:
            self.model.train(training)

    @contextmanager
    def prompts_end(self, queries: Tensor, answers: Tensor, samples: Tensor | None = None) -> Iterator[None]:
        """Tell the policies of student and teacher where prompts end, which tokens are answers, and whose they are."""
        with ExitStack() as stack:
            for attachment in (self.attachment, self.kl.other and self.kl.other.attachment):
                if attachment is not None:
                    stack.enter_context(attachment.queries(queries, answers=answers, samples=samples))
            yield

    def _teacher_flops(self, scored: int) -> float:
        """FLOPs of the teacher's forward, which has just run; `scored` tokens went through the head."""
        if not self.counts:
            return 0.0
        model, attachment = (
            (self.model, self.attachment)
            if self.kl.other is None
            else (self.kl.other.model, self.kl.other.attachment)
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


def _as_it_is(rows: Tensor) -> Tensor:
    return rows
