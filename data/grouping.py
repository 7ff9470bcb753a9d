"""Batches of samples that are alike, so that little is computed on padding and a step is all text or all images."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from latefusion.training.config import Group

CHARACTERS_PER_TOKEN = 4
POOL = 50  # batches among which samples are sorted


class Grouped(Sampler[int]):
    """An epoch's order, a function of seed and epoch alone, in which the samples of a step are alike.

    Args:
        sizes: characters of text and number of images of every sample.
        batch: samples in a whole step, over accumulation and processes.
        by: length, or modality and length.
        image_tokens: about as many as an image becomes.
        seed: of the shuffling.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], *, batch: int, by: Group, image_tokens: int, seed: int
    ):
        self.lengths = [characters // CHARACTERS_PER_TOKEN + n * image_tokens for characters, n in sizes]
        self.shows = [n > 0 for _, n in sizes]
        self.batch, self.by, self.seed, self.epoch = batch, by, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def order(self, epoch: int) -> list[int]:
        draw = random.Random(f"{self.seed} {epoch}")
        everything = list(range(len(self)))
        if self.by is Group.length:
            groups = [everything]
        else:
            groups = [[i for i in everything if self.shows[i] is shows] for shows in (True, False)]
        steps, rest = [], []
        for group in groups:
            draw.shuffle(group)
            pool = POOL * self.batch
            for start in range(0, len(group), pool):
                alike = sorted(group[start : start + pool], key=lambda i: -self.lengths[i])
                steps += [alike[i : i + self.batch] for i in range(0, len(alike), self.batch)]
            if steps and len(steps[-1]) < self.batch:
                rest += steps.pop()
        draw.shuffle(steps)
        return [i for step in steps for i in step] + rest
