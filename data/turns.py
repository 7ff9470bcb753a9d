"""Several questions about one image in one row: the image is computed once, each question is answered alone.

A row is `prefix, turn 1, turn 2, ...`, where the prefix ends with the last vision token and a turn ends with its
answer. A block mask lets a turn see the prefix and itself; its positions go on from the prefix. Without a policy, and
under one that does not rank vision tokens by text (a band, `cross`), every turn gets exactly what it would get in a row
of its own (tested in float64), at a fraction of the cost. Under a policy that ranks (`keep`, VisiPruner), the questions
of a row rank together: a token stays if any of them needs it, within the policy's number; no answer takes part.
"""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latefusion.models.fingerprint import fingerprint, rows_fingerprint


class Conversations(Dataset):
    """Questions about one image, up to `turns` of them, merged to one sample of several turns.

    Args:
        samples: rows of `{"messages", "images"}` with one question each, those of one image side by side.
        image: a name of each row's image.
        turns: questions in a sample at most; an image with more gives several samples of nearly equal size.
    """

    def __init__(self, samples: datasets.Dataset, image: list[str], turns: int):
        self.samples = samples
        self.ranges: list[range] = []
        start = 0
        for _, rows in groupby(image):
            n = len(list(rows))
            parts = -(-n // turns)
            bounds = [start + n * i // parts for i in range(parts + 1)]
            self.ranges += [range(a, b) for a, b in pairwise(bounds)]
            start += n

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = self.ranges[index]
        batch = self.samples[rows.start : rows.stop]
        messages = list(batch["messages"][0])
        for later in batch["messages"][1:]:
            messages += [{**m, "content": [p for p in m["content"] if p["type"] != "image"]} for m in later]
        return {"id": batch["id"][0], "messages": messages, "images": batch["images"][0]}

    def fingerprint(self) -> str:
        """Hash of the questions, of their images' contents and of how they are merged."""
        rows = rows_fingerprint(self.samples, whole=False)
        return fingerprint(rows, [[part.start, part.stop] for part in self.ranges])


def isolate_turns(vision: Tensor, answer: Tensor, real: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The mask and the positions under which every turn sees the prefix and itself.

    Args:
        vision: bool `[B, T]`, vision tokens; all of them must come before the first answer.
        answer: bool `[B, T]`, answers, each with the token that ends it.
        real: bool `[B, T]`, false for padding.
        dtype: of the mask: what the model computes in.

    Returns:
        `attention_mask` `[B, 1, T, T]`, additive, and `position_ids` int64 `[B, T]`.

    Raises:
        ValueError: an image comes after an answer.
    """
    length = vision.shape[1]
    position = torch.arange(length, device=vision.device)  # [T]
    prefix = vision.flip(1).cumsum(1).flip(1) > 0  # up to the last vision token
    if bool((prefix & answer).any()):
        raise ValueError(
            "data.isolate=true needs every image before the first answer; use data.isolate=false."
        )
    ended = answer.clone()
    ended[:, :-1] &= ~answer[:, 1:]
    opens = prefix.clone()  # the first token after the prefix or after an answer opens a turn
    opens[:, 1:] = (ended | prefix)[:, :-1] & ~prefix[:, 1:]
    opens[:, 0] = ~prefix[:, 0]
    turn = opens.cumsum(1)  # [B, T]: 0 in the prefix
    start = torch.where(opens, position, 0).cummax(1).values  # of the token's turn
    size = prefix.sum(1, keepdim=True)
    position_ids = torch.where(prefix, position, size + position - start)

    seen = (turn[:, :, None] == turn[:, None, :]) | (turn == 0)[:, None, :]
    seen &= (position[None, :] <= position[:, None]) & real[:, None, :]  # [B, T, T]
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, torch.finfo(dtype).min
    )
    return {"attention_mask": mask[:, None], "position_ids": position_ids}
