"""`read_prompt`: what a policy may know of a forward's tokens: which are vision, which ask, which are answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from latefusion.models.policies.base import Prompt

IGNORE = -100  # in labels: a token that is not learnt


@dataclass(frozen=True)
class PromptEnd:
    """Where prompts end, as somebody outside the forward knows it.

    Attributes:
        queries: int64 `[B, Q]`, positions of the tokens that an answer follows, -1 for none (a sample may have none at
            all, and Q may be 0); None: the last token of the prompt.
        answers: bool `[B, T]`, tokens of answers between queries; None without any.
        length: tokens of the prompt, padding included; those behind it are drafted or generated. None: all of them.
        samples: int64 `[B, T]`, the sample of each token where several share a row (`packed.Samples`); None: a row is
            a sample.
    """

    queries: Tensor | None = None
    answers: Tensor | None = None
    length: int | None = None
    samples: Tensor | None = None


def read_prompt(
    vision: Tensor,
    real: Tensor,
    *,
    past: int,
    end: PromptEnd,
    position_ids: Tensor | None,
    num_layers: int,
    attention: tuple[bool, ...] = (),
) -> Prompt | None:
    """The prompt of a forward; None if it has no vision tokens. One host sync, the only one whatever the policy.

    Args:
        vision: bool `[B, T]`.
        real: bool `[B, T]`, false for padding.
        past: tokens before this forward.
        position_ids: int64 `[B|1, T]` or `[axes, B|1, T]`, of the decoder; None: they are consecutive.
        attention: per layer, whether it attends with a softmax; empty: all do.

    Raises:
        ValueError: the queries do not fit the batch, or its rows.
    """
    batch, length = real.shape
    vision, column = vision & real, torch.arange(length, device=real.device)
    of_prompt, later = real, False  # bool [B, T]
    if end.length is not None and end.length - past < length:
        of_prompt, later = real & (column < end.length - past), True  # tokens come behind the prompt
    last = (of_prompt * column).amax(1, keepdim=True)  # [B, 1]
    queries, asks, late, outside = last, None, None, None
    if end.queries is not None:
        queries = end.queries.to(real.device)
        if queries.shape[0] != batch:
            raise ValueError(f"queries name rows for {queries.shape[0]} samples, but the batch has {batch}.")
        asks = (queries >= 0).any(1, keepdim=True)  # bool [B, 1]
        outside = queries >= length  # bool [B, Q]
        if queries.shape[1]:  # a sample's own last query fills its row, its last token if it has none
            fill = torch.where(asks, queries.amax(1, keepdim=True), last)
            queries = torch.where(queries < 0, fill, queries)
        else:
            queries = last
        late = vision & (column > queries.amax(1, keepdim=True))
    seen = vision.cumsum(1)
    after = torch.logical_and(real ^ vision, seen)  # bool [B, T], text behind the first vision token
    text, answer = after, None
    if end.queries is not None or end.answers is not None or later:
        text = after & (column <= queries.amax(1, keepdim=True))
        if end.answers is not None:
            answers = end.answers[:, :length].to(real.device)
            # what was generated since comes after all queries
            text = text & ~pad(answers, (0, length - answers.shape[1]))
        answer = after & ~text
    head = torch.where(text, 0, column).amax(1)  # [B], the last column that is no text
    cut = vision[:, :1] if past else None  # [B, 1], begins inside an image
    if end.queries is None:  # or ends there
        ends = vision.gather(1, last)
        cut = ends if cut is None else cut | ends
    packed = restarts(position_ids, real)
    masks = {"vision": vision, "real": real, "text": text}
    others = {"answer": answer, "cut": cut, "packed": packed, "asks": asks, "late": late, "outside": outside}
    masks |= {name: mask for name, mask in others.items() if mask is not None}
    sums = (mask.sum(1) for mask in masks.values())
    heads, widths, *numbers = torch.stack([head, seen.count_nonzero(1), *sums]).tolist()
    counts = {name: tuple(row) for name, row in zip(masks, numbers, strict=True)}
    n_vision, none = counts["vision"], (0,) * batch
    if any(counts.get("outside", none)):
        raise ValueError(f"queries name positions beyond the rows, which have {length} tokens; count from 0.")
    if not any(n_vision):
        return None
    tokens = zip(n_vision, counts["text"], counts.get("answer", none), strict=True)
    holes = any(width > sum(there) for width, there in zip(widths, tokens, strict=True))
    return Prompt(
        vision=vision,
        real=real,
        queries=queries,
        text=text,
        n_vision=n_vision,
        n_real=counts["real"],
        n_text=counts["text"],
        n_answer=counts.get("answer", none),
        tail=0 if holes else length - 1 - max(heads),
        num_layers=num_layers,
        piece=any(counts.get("cut", none)),
        packed=any(counts.get("packed", none)),
        asks=tuple(map(bool, counts.get("asks", (1,) * batch))),
        past=past,
        late=any(counts.get("late", none)),
        attention=attention,
    )


def end_of_labels(labels: Tensor, vision: Tensor) -> PromptEnd:
    """Where prompts end, as `labels` int64 `[B, T]` say: before the first answer after an image, or the first at all.

    It is the rule of the project's own collator: later answers have read that one.

    Args:
        vision: bool `[B, T]`.
    """
    learnt = labels != IGNORE  # bool [B, T]
    first = learnt & ~pad(learnt[:, :-1], (1, 0))  # where an answer begins
    pictured = first & (vision.cumsum(1) > 0)
    first = torch.where(pictured.any(1, keepdim=True), pictured, first)
    place = first.int().argmax(1, keepdim=True) - 1  # [B, 1]
    return PromptEnd(torch.where(first.any(1, keepdim=True), place, -1), learnt)


def hides_no_question(labels: Tensor, real: Tensor) -> Tensor:
    """Whether labels `[B, T]` teach the question too, in any row: its first two tokens are learnt. Bool scalar."""
    learnt = (labels != IGNORE) & real
    return (learnt & (real.cumsum(1) <= 2)).any()


def restarts(position_ids: Tensor | None, real: Tensor) -> Tensor | None:
    """Where positions begin again although no padding lies between, as they do in packed rows, bool `[B, T - 1]`.

    None: nowhere, since they are consecutive.
    """
    if position_ids is None:
        return None
    position = position_ids[0] if position_ids.dim() == 3 else position_ids  # [B|1, T]
    return (position[:, 1:] < position[:, :-1]) & real[:, 1:] & real[:, :-1]


def real_tokens(padding: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Which tokens of a forward are not padding, bool `[B, T]`.

    Args:
        padding: the 2-D attention mask `[B|1, past + T]`, or its last T columns; None: there is no padding.
    """
    if padding is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    return padding[:, -length:].to(device=device, dtype=torch.bool).expand(batch, -1)


def earlier_tokens(padding: Tensor | None, length: int, past: int) -> Tensor | bool:
    """Which rows have tokens before this forward's `length`, bool `[B|1, 1]`, or the same for all."""
    if not past or padding is None or padding.shape[-1] <= length:
        return past > 0
    return padding[:, :-length].bool().any(1, keepdim=True)


def padding_of(mask: Any) -> Tensor | None:
    """The 2-D attention mask of a forward, or the one that its 4-D mask implies; None if it has neither.

    Padding is what no token sees, itself included: under a 4-D mask `[B|1, H|1, T, L]` (bool or additive), the tokens
    whose own cell is hidden.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask
    itself = mask[:, 0].diagonal(offset=mask.shape[3] - mask.shape[2], dim1=1, dim2=2)  # [B, T]
    return itself > torch.finfo(itself.dtype).min / 2 if itself.is_floating_point() else itself
