"""Samples side by side in a row instead of one below the other: less padding is computed, or none.

A packed row is `sample 1, sample 2, ...` without a mask: positions begin again with every sample, by which the mask
functions of transformers and its flash attention tell them apart, so none sees another. `samples` says the same to the
executor: each sample's vision tokens are ranked, removed, entered and read as in a row of its own. Every token's
output, and so loss and gradients, are those of such a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from latefusion.data.collate import IGNORE

TAUGHT = ("teacher_tokens", "teacher_logprobs")  # [N, k], by label token, sample by sample
IMAGES = ("pixel_values", "mm_encoder_outputs")  # arguments that bring images
WIDER = 2  # a row with images gets as long as this many of the longest sample: its layers of text alone are shorter


class Packed:
    """A collator that packs the samples of a batch.

    Samples with images keep their order, since the order of the images is theirs. Under flash attention a batch with
    images stays as it is: its kernel would let samples see each other once vision tokens have left.

    Args:
        collator: makes the batches, padded on the right.
        one_row: put all samples into one row, as flash attention needs it. Elsewhere a row gets no longer than the
            longest sample, or twice that with images, so that the mask `[B, 1, T, T]` stays small.
        axes: number of positions of a token: 1, or more for a decoder with multimodal RoPE.
        rope: the model's own positions of a batch with images, `(input_ids, ...) -> ([axes - 1, B, T], ...)`, where
            they are not 0, 1, 2, ...
        pictures: pack batches with images, too.
    """

    def __init__(
        self,
        collator: Callable[..., dict[str, Tensor]],
        *,
        one_row: bool,
        axes: int,
        rope: Callable[..., tuple[Tensor, Any]] | None = None,
        pictures: bool = True,
    ):
        self.collator, self.one_row, self.axes, self.rope = collator, one_row, axes, rope
        self.pictures = pictures and not one_row and (axes == 1 or rope is not None)

    @classmethod
    def of(
        cls, model: PreTrainedModel, collator: Callable[..., dict[str, Tensor]], *, pictures: bool = True
    ) -> Packed:
        """A packing collator that suits the model's attention and positions."""
        text = model.config.get_text_config()
        multimodal = "mrope_section" in (text.rope_parameters or {})
        return cls(
            collator,
            one_row=is_flash_attention_requested(text),
            axes=4 if multimodal else 1,
            rope=getattr(model.base_model, "get_rope_index", None) if multimodal else None,
            pictures=pictures,
        )

    def __call__(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        batch = self.collator(samples)
        pictured = any(name.startswith(IMAGES) for name in batch)
        if pictured and not self.pictures:
            return batch
        return self.packed(batch, pictured=pictured)

    def packed(self, batch: dict[str, Any], *, pictured: bool = False) -> dict[str, Any]:
        """A batch `[B, T]` as `[R, T']`; `labels` and `queries` (and a teacher's answers) go along.

        Args:
            pictured: it has images, whose tensors stay as they are.

        Returns:
            The batch with `position_ids` (`[R, T']`, or `[axes, R, T']`) in place of `attention_mask`, and `samples`
            int64 `[R, T']`, the sample of each token in the order of the rows, -1 for padding.
        """
        mask, labels, queries = batch["attention_mask"], batch["labels"], batch["queries"]
        lengths = mask.sum(1).tolist()
        shape, rows = mask.shape, [list(range(len(lengths)))]
        if not self.one_row:
            rows = in_order(lengths, WIDER * max(lengths)) if pictured else fitted(lengths)
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
        kept = {
            name: joined(values, fills.get(name, 0)) if getattr(values, "shape", None) == shape else values
            for name, values in batch.items()
            if name not in ("attention_mask", "queries", *TAUGHT)
        }
        order = [i for row in rows for i in row]
        number = torch.tensor(order).argsort()[:, None].expand(shape)  # in the order of the rows
        kept["samples"] = joined(number, -1)
        kept["queries"] = _moved(queries, rows, lengths)
        if TAUGHT[0] in batch:
            counts = (labels[:, 1:] != IGNORE).sum(1).tolist()
            for name in TAUGHT:
                parts = batch[name].split(counts)
                kept[name] = torch.cat([parts[i] for i in order])
        steps = torch.arange(mask.shape[1]).expand_as(mask)
        positions = joined(steps, 0)  # [R, T']
        if self.axes > 1:
            axes = [positions] * (self.axes - 1)
            if pictured:
                assert self.rope is not None
                names = inspect.signature(self.rope).parameters
                rope_positions = self.rope(**{name: value for name, value in batch.items() if name in names})[
                    0
                ]
                axes = [joined(axis, 0) for axis in rope_positions]  # [R, T'] each
            positions = torch.stack([positions, *axes])  # the first tells samples apart
        kept["position_ids"] = positions
        return kept


def in_order(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Samples by row, in their order: each into the row of the one before while it has room."""
    rows: list[list[int]] = []
    free = 0
    for i, length in enumerate(lengths):
        if length > free:
            rows.append([])
            free = room
        rows[-1].append(i)
        free -= length
    return rows


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


@torch.no_grad()
def isolates_images(model: PreTrainedModel, processor: Any) -> bool:
    """Whether a packed sample sees only itself, and no token after its own, beside one that has an image.

    Gemma 3's image tokens see each other both ways; its masks take the positions of one sample's image for an image in
    every sample of the row.
    """
    packed = Packed.of(model, dict)
    if not packed.pictures:
        return False
    image = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
    pictured = dict(processor(text=[f"{processor.image_token} a b c"], images=[[image]], return_tensors="pt"))
    ids = pictured["input_ids"]  # [1, T]
    a, b = [i for i in range(3) if i != model.config.image_token_id][:2]
    place = int((ids[0] == model.config.image_token_id).nonzero()[-1])  # of the last vision token
    batch = {
        name: torch.cat([value, torch.full_like(value, int(name == "attention_mask"))])
        if value.shape == ids.shape
        else value
        for name, value in pictured.items()
    }  # a sample with an image, and one of text that is as long
    training, seconds = model.training, []
    model.eval()
    try:
        for end, beside in ((a, a), (b, a), (a, b)):
            changed = batch["input_ids"].clone()
            changed[0, -1], changed[1], changed[1, place] = end, a, beside
            row = packed.packed(
                {**batch, "input_ids": changed, "labels": changed, "queries": changed[:, :1] * 0},
                pictured=True,
            )
            inputs = {
                name: value.to(model.device, model.dtype if value.is_floating_point() else None)
                for name, value in row.items()
                if name not in ("labels", "queries", "samples")
            }
            logits = model(**inputs, use_cache=False).logits.cpu()
            seconds.append(logits[row["samples"] == 1][:place])
    finally:
        model.train(training)
    return all(torch.equal(seconds[0], other) for other in seconds[1:])
