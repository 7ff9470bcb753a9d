"""Prompts with answers, as the profile measures them."""

from __future__ import annotations

import torch
from helpers.families import prompt, vision_tokens

from latefusion.data.prompt_batches import Batch

ONE_IMAGE = ["tt I tttt", "tt I tttttt"]
MIXED = ["tt I ttt", "t I tt I ttt"]


def batch_of(family: str, rows: list[str]) -> Batch:
    """Padded on the right, the last two tokens of each row its answer."""
    inputs = prompt(family, rows, side="right")
    ids, real = inputs["input_ids"], inputs["attention_mask"].sum(1)
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(real.tolist()):
        labels[row, length - 2 : length] = ids[row, length - 2 : length]
    return Batch(tuple(map(str, rows)), inputs, labels, (real - 3)[:, None], vision_tokens(inputs))
