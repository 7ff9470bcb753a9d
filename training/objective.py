"""The objective: cross-entropy on answer tokens, and KL to the teacher at the same positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from latefusion.data.collate import IGNORE, label_columns
from latefusion.models.attach import Attachment
from latefusion.models.inputs import fresh_inputs, image_features, unwrapped
from latefusion.models.policies.base import Policy
from latefusion.training.cost import backward_ends, computed_flops
from latefusion.training.teacher import OtherTeacher


class Objective:
    """`(sum of cross-entropies + weight * temperature^2 * sum of KL(teacher || student)) / count`.

    The teacher is `model` itself with its adapters off, in eval mode, under `teacher`: one more forward pass,
    no second copy of any weight; or it is `other`, a frozen model. Dividing by the token count of the whole
    optimizer step, rather than of a micro-batch, makes the gradient independent of accumulation and of the
    number of processes.

    Args:
        model: the student, whose adapters `disable_adapter` turns off.
        attachment: of `model`, holding the student's policy.
        teacher: the teacher's policy; None: cross-entropy alone.
        weight, temperature: of the KL term (Hinton et al., arXiv 1503.02531).
        share_images: encode images once for teacher and student; right where all that LoRA and
            `modules_to_save` train comes after the projector.
        blank: what the processor makes of any one image. Given, batches without images run the vision tower
            on it and drop the result: where weights are sharded, or the projector trains, every process
            must run the same modules.
        narrowing: the student's policy at a moment of the run (0 to 1), where it changes; None: it does not.
        other: the model that teaches, under its own policy; None: `model` does.
        vocabulary: token ids that `other` scores too; None: all.
        sharded: weights lie in shards (ZeRO-3), which all processes gather module by module in the same order: the
            vision tower goes first, whether a process has images or not.

    Attributes:
        counts: say in the terms how many FLOPs were computed.
    """

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
        self.blank = blank
        self.other = other if self.teacher is not None else None
        self.vocabulary = vocabulary
        self.sharded = sharded

    def __call__(
        self, forward: Callable[..., Any], batch: dict[str, Any], *, count: Tensor | int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch's share of the loss.

        Args:
            forward: the student, as the engine wraps it (DDP, DeepSpeed).
            batch: of the collator; `labels` `[B, T]` and `queries` `[B, Q]` among it, and `teacher_tokens` and
                `teacher_logprobs` `[N, k]` where the teacher's answers were written before.
            count: label tokens in the whole optimizer step, over accumulation and processes.

        Returns:
            The loss, and its two terms as sums over tokens: `ce`, `kl`, with `tokens`, their number.
        """
        inputs = dict(batch)
        tokens, logprobs = inputs.pop("teacher_tokens", None), inputs.pop("teacher_logprobs", None)
        labels, queries = inputs.pop("labels"), inputs.pop("queries")
        columns = label_columns(labels)  # [R]
        targets = labels[:, columns + 1]  # [B, R]
        learnt = targets != IGNORE  # bool [B, R]
        inputs.update(logits_to_keep=columns, use_cache=False)
        seen, idle = inputs, self.idles(inputs)
        if self.share_images and "pixel_values_videos" not in inputs:
            with torch.no_grad():
                inputs = self.encode_images(inputs)
                if idle:
                    self.encode_blank(labels.device)

        with self.asked(queries, labels != IGNORE):
            wanted = None  # [N, V]
            if self.teacher is not None:
                wanted = self.teach(inputs if self.other is None else seen, learnt)
            cost = self.teacher_cost(columns.numel() * len(labels)) if wanted is not None else 0
            nothing = None
            if not self.share_images:
                inputs, nothing = self.tower_first(inputs, labels.device)
            with self.added(nothing):
                logits = forward(**fresh_inputs(inputs)).logits[learnt].float()  # [N, V]
        ce = F.cross_entropy(logits, targets[learnt], reduction="sum")
        loss, kl = ce, torch.zeros_like(ce)
        scored = logits[:, : self.vocabulary]
        if wanted is not None:
            kl = distillation(scored, wanted, self.temperature)
        elif self.weight > 0 and tokens is not None:
            kl = distillation_from(scored, tokens, logprobs, self.temperature)
        loss = loss + self.weight * kl
        terms = {"ce": ce.detach(), "kl": kl.detach(), "tokens": learnt.sum()}
        if self.counts:
            terms["flops"] = torch.tensor(
                cost + self.student_cost(columns.numel() * len(labels)), device=ce.device
            )
        return loss / count, terms

    def teacher_cost(self, scored: int) -> float:
        """FLOPs of the teacher's pass, which has just run; `scored` tokens went through the head."""
        if not self.counts:
            return 0.0
        model, attachment = (
            (self.model, self.attachment) if self.other is None else (self.other.model, self.other.attachment)
        )
        return float(computed_flops(attachment, model.config, scored))

    def student_cost(self, scored: int) -> float:
        """FLOPs of the student's pass, which has just run, and of its backward pass.

        As many again as forward, in the layers that the backward pass reaches; twice as many where the weights
        themselves train. What gradient checkpointing computes again does not count.
        """
        config, backward = self.model.config, 1 if isinstance(self.model, PeftModel) else 2
        forward = computed_flops(self.attachment, config, scored)
        first = backward_ends(self.model)
        return float(forward + backward * computed_flops(self.attachment, config, scored, first=first))

    @contextmanager
    def asked(self, queries: Tensor, answers: Tensor) -> Iterator[None]:
        """Student and teacher know where the prompts end."""
        with ExitStack() as stack:
            for attachment in (self.attachment, self.other and self.other.attachment):
                if attachment is not None:
                    stack.enter_context(attachment.queries(queries, answers=answers))
            yield

    def at(self, moment: float) -> None:
        """Tell where in the run (0 to 1) the forwards to come are."""
        if self.narrowing is not None:
            self.attachment.policy = self.narrowing(moment)

    @torch.no_grad()
    def answers(self, batch: dict[str, Any]) -> Tensor:
        """The teacher's logits where labels are, sample by sample, float32 `[N, V]`."""
        inputs = dict(batch)
        labels, queries = inputs.pop("labels"), inputs.pop("queries")
        columns = label_columns(labels)  # [R]
        inputs.update(logits_to_keep=columns, use_cache=False)
        with self.asked(queries, labels != IGNORE):
            return self.teach(inputs, labels[:, columns + 1] != IGNORE)

    @torch.no_grad()
    def teach(self, inputs: dict[str, Any], learnt: Tensor) -> Tensor:
        """The teacher's logits where labels are, float32 `[N, V]`."""
        if self.other is not None:
            with torch.autocast(
                learnt.device.type, enabled=False
            ):  # in the dtype of its weights, as at inference
                if self.other.sharded:
                    inputs, _ = self.tower_first(inputs, learnt.device, self.other.model)
                return self.other.forward(**fresh_inputs(inputs)).logits[learnt][:, : self.vocabulary].float()
        training = self.model.training
        self.model.eval()
        try:
            with self.model.disable_adapter(), self.attachment.using(self.teacher):
                if not self.share_images:
                    inputs, _ = self.tower_first(inputs, learnt.device)
                return self.model(**fresh_inputs(inputs)).logits[learnt].float()
        finally:
            self.model.train(training)

    def encode_images(self, inputs: dict[str, Any], owner: Any = None) -> dict[str, Any]:
        """`inputs` with `pixel_values`, if any, replaced by the features that the decoder would receive."""
        if "pixel_values" not in inputs:
            return inputs
        rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
        return {**rest, "mm_encoder_outputs": {"image": self.encode(inputs, owner)}}

    def tower_first(
        self, inputs: dict[str, Any], device: torch.device, owner: Any = None
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Before a forward (of `owner`; None: the student): its vision tower, where others may run theirs.

        Returns:
            What is left to give to the forward, and zero, by way of a tower that has nothing else to do.
        """
        if self.idles(inputs):
            return inputs, self.encode_blank(device, owner)
        if self.sharded and "pixel_values_videos" not in inputs:
            with self.mixed(device, owner) if torch.is_grad_enabled() else nullcontext():
                return self.encode_images(inputs, owner), None
        return inputs, None

    def idles(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the vision tower, which other processes may run now, has nothing to do here."""
        given = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
        return self.blank is not None and not any(name in inputs for name in given)

    def encode(self, inputs: Mapping[str, Any], owner: Any = None) -> Any:
        owner = owner or self.model
        sharded = isinstance(owner, FSDPModule)  # then the outermost module gathers the weights
        return image_features(owner if sharded else unwrapped(owner).base_model, inputs)

    def encode_blank(self, device: torch.device, owner: Any = None) -> Tensor:
        """Zero, by way of the vision tower and the projector (of `owner`; None: the student's)."""
        assert self.blank is not None
        moved = {name: torch.as_tensor(value).to(device) for name, value in self.blank.items()}
        with self.mixed(device, owner):
            return 0.0 * sum(features.sum() for features in self.encode(moved, owner).pooler_output)

    @contextmanager
    def added(self, nothing: Tensor | None) -> Iterator[None]:
        """Have zero go into the student where images would: every process's backward pass runs the same modules."""
        if nothing is None:
            yield
            return
        hook = self.model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output + nothing.to(output.dtype)
        )
        try:
            yield
        finally:
            hook.remove()

    def mixed(self, device: torch.device, owner: Any = None) -> torch.autocast:
        """What the engine puts around `forward` alone: a projector that trains is float32 in a bfloat16 model."""
        enabled = (owner or self.model).dtype is torch.bfloat16
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def distillation(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """`temperature^2 * KL(softmax(wanted / temperature) || softmax(logits / temperature))`, summed.

    Args:
        logits, wanted: of student and teacher, `[N, V]`.
    """
    student = F.log_softmax(logits / temperature, dim=-1)
    teacher = F.log_softmax(wanted / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="sum")


def distillation_from(logits: Tensor, tokens: Tensor, logprobs: Tensor, temperature: float) -> Tensor:
    """`distillation` where the teacher is known at its likeliest tokens: the rest of the vocabulary counts as one.

    With the whole vocabulary it is `distillation`; with less it is a lower bound of it.

    Args:
        logits: of the student, `[N, V]`.
        tokens: int64 `[N, k]`; logprobs: of the teacher at them, at this temperature, `[N, k]`.
    """
    student = F.log_softmax(logits / temperature, dim=-1)  # [N, V]
    at = student.gather(1, tokens)  # [N, k]
    terms = logprobs.exp() * (logprobs - at)
    kl = terms.masked_fill(logprobs == float("-inf"), 0).sum()
    if tokens.shape[1] < logits.shape[1]:
        others = student.scatter(1, tokens, float("-inf")).logsumexp(-1)  # [N]
        rest = 1 - logprobs.exp().sum(-1)  # [N]
        kl = kl + torch.where(rest > 0, torch.xlogy(rest, rest) - rest * others, 0.0).sum()
    return temperature**2 * kl
