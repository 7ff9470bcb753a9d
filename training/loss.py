"""The loss of answer tokens, some at a time: no more logits exist at once than `LOGITS`, whatever the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 2**24  # at a time: 64 MB in float32

Read = Callable[[Tensor], Tensor]  # rows [n, D] -> logits [n, V]


@dataclass(kw_only=True)
class Teaching:
    """A teacher's predictions of N label tokens, whole or its likeliest tokens alone.

    Attributes:
        temperature: of the KL term.
        rows: the teacher's last hidden states `[N, D]`; with `read`, the way from them to logits.
        tokens, logprobs: in their place the teacher's likeliest tokens, and its log-probabilities of them, `[N, k]`.
        vocabulary: number of token ids that teacher and student both score; None: all.
    """

    temperature: float
    rows: Tensor | None = None
    read: Read | None = None
    tokens: Tensor | None = None
    logprobs: Tensor | None = None
    vocabulary: int | None = None

    def compare(self, logits: Tensor, labels: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """The KL of the tokens `part`, and which of their labels are the teacher's first choice.

        Args:
            logits: of the student, `[n, V]`; labels: int64 `[n]`.
        """
        shared = logits[:, : self.vocabulary]
        if self.rows is not None:
            assert self.read is not None
            with torch.no_grad():
                taught = wide(self.read(self.rows[part]))[:, : self.vocabulary]  # [n, V]
                choices = taught.argmax(-1)
            return distillation(shared, taught, self.temperature), choices == labels
        assert self.tokens is not None and self.logprobs is not None
        tokens, logprobs = self.tokens[part], self.logprobs[part]
        return distillation_from(shared, tokens, logprobs, self.temperature), tokens[:, 0] == labels


class Terms:
    """Sums over label tokens: cross-entropy, KL, and labels that are the teacher's first choice."""

    def __init__(self, device: torch.device):
        self.ce, self.kl = torch.zeros((), device=device), torch.zeros((), device=device)
        self.right = torch.zeros((), dtype=torch.long, device=device)


def answer_loss(
    rows: Tensor,
    labels: Tensor,
    read: Read,
    teaching: Teaching | None,
    terms: Terms,
    *,
    weight: float,
    width: int,
    trained: Sequence[Tensor] = (),
) -> Tensor:
    """`sum of cross-entropies + weight * temperature^2 * sum of KL(teacher || student)`; its terms go to `terms`.

    Args:
        rows: the student's last hidden states at the positions that predict the labels, `[N, D]`.
        labels: int64 `[N]`.
        read: from rows to logits.
        teaching: None: cross-entropy alone.
        width: V, by which the rows are divided.
        trained: weights inside `read` that train.
    """

    def loss_of(chunk: Tensor, part: slice) -> Tensor:
        logits = wide(read(chunk))  # [n, V]
        loss = F.cross_entropy(logits, labels[part], reduction="sum")
        terms.ce = terms.ce + loss.detach()
        if teaching is not None:
            kl, right = teaching.compare(logits, labels[part], part)
            terms.kl, terms.right = terms.kl + kl.detach(), terms.right + right.sum()
            loss = loss + weight * kl
        return loss

    parts = max(1, -(-len(rows) * width // LOGITS))
    return _Summed.apply(loss_of, -(-len(rows) // parts), torch.is_grad_enabled(), rows, *trained)


class _Summed(torch.autograd.Function):
    """The sum of a loss over parts of the rows. Gradients are computed on the way, so that no part is kept.

    The head therefore runs once a row, forward and backward, and the backward pass needs none of its weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: Callable[[Tensor, slice], Tensor],
        size: int,
        learns: bool,
        rows: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        learns = learns and any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=wide_dtype(rows), device=rows.device)
        of_rows = torch.zeros_like(rows) if learns else None
        of_weights: list[Tensor | None] = [None] * len(weights)
        for start in range(0, len(rows), max(1, size)):
            part = slice(start, start + size)
            with torch.set_grad_enabled(learns):
                chunk = rows[part].detach().requires_grad_(learns)
                value = loss(chunk, part)
            total += value.detach()
            if of_rows is None:
                continue
            of_rows[part], *gradients = torch.autograd.grad(value, [chunk, *weights])
            whole = size >= len(rows)
            for i, gradient in enumerate(gradients):  # many parts are summed in float32
                before = of_weights[i]
                of_weights[i] = (
                    gradient if whole else wide(gradient) if before is None else before.add_(gradient)
                )
        if of_rows is not None:
            pairs = zip(of_weights, weights, strict=True)
            made = [torch.zeros_like(weight) if g is None else g for g, weight in pairs]  # None: no rows
            ctx.save_for_backward(of_rows, *made)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [saved * gradient for saved in ctx.saved_tensors]
        needed = ctx.needs_input_grad[3:]
        return (None, None, None, *(g if need else None for g, need in zip(scaled, needed, strict=True)))


def wide_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def wide(values: Tensor) -> Tensor:
    """Logits in float32, or float64 if they are."""
    return values.to(wide_dtype(values))


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`temperature^2 * KL(softmax(teacher_logits / temperature) || softmax(logits / temperature))`, summed.

    Args:
        logits, teacher_logits: of student and teacher, `[N, V]`.
    """
    student = F.log_softmax(logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="sum")


def distillation_from(logits: Tensor, tokens: Tensor, logprobs: Tensor, temperature: float) -> Tensor:
    """`distillation` from the teacher's likeliest tokens; the rest of the vocabulary counts as one.

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
