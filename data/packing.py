"""Text-only samples side by side in a row instead of one below the other: no padding is computed.

A packed row is `sample 1, sample 2, ...` without a mask: positions begin again with every sample, by which the mask
functions of transformers and its flash attention tell them apart, so none sees another. Every token's output, and so
loss and gradients, are those of a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from latefusion.data.collate import IGNORE

TAUGHT = ("teacher_tokens", "teacher_logprobs")  # [N, k], by label token, sample by sample


class Packed:
    """A collator that packs the samples of batches without images; batches with images stay as they are.

    Args:
        collator: makes the batches, padded on the right.
        one_row: put all samples into one row, as flash attention needs it. Elsewhere a row gets no longer than the
            longest sample, so that the mask `[B, 1, T, T]` never grows.
        axes: number of positions of a token: 1, or more for a decoder with multimodal RoPE.
    """

    def __init__(self, collator: Callable[..., dict[str, Tensor]], *, one_row: bool, axes: int):
        self.collator, self.one_row, self.axes = collator, one_row, axes

    @classmethod
    def of(cls, model: PreTrainedModel, collator: Callable[..., dict[str, Tensor]]) -> Packed:
        """A packing collator that suits the model's attention and positions."""
        text = model.config.get_text_config()
        multimodal = "mrope_section" in (text.rope_parameters or {})
        return cls(collator, one_row=is_flash_attention_requested(text), axes=4 if multimodal else 1)

    def __call__(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        batch = self.collator(samples)
        shape = batch["input_ids"].shape
        text = all(v.shape == shape for name, v in batch.items() if name not in ("queries", *TAUGHT))
        return self.packed(batch) if text else batch

    def packed(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A text-only batch `[B, T]` as `[R, T']`; `labels` and `queries` (and a teacher's answers) go along.

        Returns:
            The batch with `position_ids` (`[R, T']`, or `[axes, R, T']`) in place of `attention_mask`.
        """
        mask, labels, queries = batch["attention_mask"], batch["labels"], batch["queries"]
        lengths = mask.sum(1).tolist()
        rows = [list(range(len(lengths)))] if self.one_row else fitted(lengths)
        width = max(sum(lengths[i] for i in row) for row in rows)

        def joined(values: Tensor, fill: int) -> Tensor:
            """`[B, T]` as `[R, T']`."""
            out = values.new_full((len(rows), width), fill)
            for r, row in enumerate(rows):
                parts = torch.cat([values[i, : lengths[i]] for i in row])
                out[r, : len(parts)] = parts
            return out

        pads = batch["input_ids"][mask == 0]
        fills = {"input_ids": int(pads[0]) if len(pads) else 0, "labels": IGNORE}
        others = ("attention_mask", "queries", *TAUGHT)
        kept = {
            name: joined(values, fills.get(name, 0)) for name, values in batch.items() if name not in others
        }
        kept["queries"] = _moved(queries, rows, lengths)
        if TAUGHT[0] in batch:
            counts = (labels[:, 1:] != IGNORE).sum(1).tolist()
            order = [i for row in rows for i in row]
            for name in TAUGHT:
                parts = batch[name].split(counts)
                kept[name] = torch.cat([parts[i] for i in order])
        steps = torch.arange(mask.shape[1]).expand_as(mask)
        positions = joined(steps, 0)  # [R, T']
        kept["position_ids"] = positions if self.axes == 1 else positions.expand(self.axes, -1, -1)
        return kept


def fitted(lengths: Sequence[int]) -> list[list[int]]:
    """Samples by row, the longest first, each into the first row where it fits; no row is longer than the longest."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        r = next((r for r, free in enumerate(room) if lengths[i] <= free), None)
        if r is None:
            rows.append([])
            room.append(max(lengths))
            r = len(rows) - 1
        rows[r].append(i)
        room[r] -= lengths[i]
    return rows


def _moved(queries: Tensor, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
    """The queries of a row's samples where they stand in it, `[R, Q']`, short rows filled with their last one."""
    moved = []
    for row in rows:
        start, parts = 0, []
        for i in row:
            parts.append(queries[i].unique_consecutive() + start)
            start += lengths[i]
        moved.append(torch.cat(parts))
    width = max(map(len, moved))
    return torch.stack([torch.cat([row, row[-1:].expand(width - len(row))]) for row in moved])


@torch.no_grad()
def check_isolation(model: PreTrainedModel) -> None:
    """Raise if a packed sample of this model sees the one before it.

    Raises:
        ValueError: in one sentence.
    """
    words = [i for i in range(7) if i != model.config.image_token_id]
    position_ids = torch.arange(3).repeat(2)[None].expand(Packed.of(model, dict).axes, -1, -1)  # [axes, 1, 6]
    training = model.training
    model.eval()
    try:
        seconds = [
            model(
                input_ids=torch.tensor([first + words[3:6]], device=model.device),
                position_ids=(position_ids if len(position_ids) > 1 else position_ids[0]).to(model.device),
                use_cache=False,
            ).logits[:, 3:]
            for first in (words[:3], words[2::-1])
        ]
    finally:
        model.train(training)
    if not torch.equal(*seconds):
        raise ValueError(
            f"data.pack=true does not work with {type(model).__name__} under {model.config._attn_implementation}: "
            "packed samples would see each other; use data.pack=false."
        )
