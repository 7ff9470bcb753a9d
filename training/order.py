"""Which samples a step takes, and whether its teacher runs: by the seed and the step alone, under every engine."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from latefusion.data.bad_rows import Checked
from latefusion.data.streaming import Stream
from latefusion.recipes.schema import Group, TrainConfig

POOL = 50  # steps whose samples are sorted by length together


class Order(Sampler[int]):
    """Sample indices of a whole run: epochs, each in another order, one after another without a seam.

    A step takes the next `size` positions, and may reach over the end of an epoch. So every step is full, and no sample
    is given out twice to fill a batch: the loss does not depend on how a step is divided among processes and
    accumulation. There is no state to save: a resumed run continues at its step.

    Args:
        n: samples in the data set.
        steps: of the run.
        size: samples a step takes, over accumulation and processes.
        seed: of the shuffling; each epoch of each seed has an order of its own (`epoch_seed`).
        lengths: of the samples; a step then takes samples of similar length (less padding). None: any samples.
        kinds: of the samples; a step then takes samples of one kind. None: any samples.
    """

    def __init__(
        self,
        n: int,
        *,
        steps: int,
        size: int,
        seed: int,
        lengths: Sequence[Any] | None = None,
        kinds: Sequence[bool] | None = None,
    ):
        self.n, self.steps, self.size, self.seed = n, steps, size, seed
        self.lengths, self.kinds = lengths, kinds
        self._epoch: int | None = None
        self._shuffled: list[int] = []

    def __len__(self) -> int:
        return self.steps * self.size

    def __iter__(self) -> Iterator[int]:
        return map(self.at, range(len(self)))

    def at(self, position: int) -> int:
        """The sample at this position of the run."""
        epoch, place = divmod(position, self.n)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
            shuffled = torch.randperm(self.n, generator=generator).tolist()
            if self.lengths is not None:
                shuffled = self._grouped(shuffled, -epoch * self.n % self.size, generator)
            self._epoch, self._shuffled = epoch, shuffled
        return self._shuffled[place]

    def _grouped(self, shuffled: list[int], head: int, generator: torch.Generator) -> list[int]:
        """Sort stretches of `POOL` steps by length, then shuffle the steps.

        Args:
            head: samples at the start of the epoch that complete the last step of the epoch before.
        """
        assert self.lengths is not None
        body, stretch = shuffled[head:], POOL * self.size
        kinds = (
            [body] if self.kinds is None else [[i for i in body if self.kinds[i] == k] for k in (True, False)]
        )
        steps = []
        for members in kinds:
            for start in range(0, len(members), stretch):
                alike = sorted(members[start : start + stretch], key=self.lengths.__getitem__, reverse=True)
                steps += [alike[i : i + self.size] for i in range(0, len(alike), self.size)]
        last = [i for step in steps if len(step) < self.size for i in step]
        full = [step for step in steps if len(step) == self.size]
        mixed = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return shuffled[:head] + [i for step in mixed for i in step] + last

    def share(self, step: int, rank: int, world: int, micro: int) -> list[list[int]]:
        """The micro-batches, of `micro` samples each, that one process takes in one step.

        Micro-batches are dealt to the processes in turn, as accelerate does.
        """
        start = step * self.size
        return [
            [self.at(start + i + j) for j in range(micro)]
            for i in range(rank * micro, self.size, micro * world)
        ]

    def epoch(self, step: int) -> float:
        """Epochs done after this number of steps."""
        return step * self.size / self.n


class InOrder(Order):
    """Position after position of a stream, which shuffles by itself and has no end.

    Its rows are not counted, so the whole run is one epoch.
    """

    def __init__(self, *, steps: int, size: int):
        super().__init__(steps * size, steps=steps, size=size, seed=0)

    def at(self, position: int) -> int:
        return position


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed that shuffles an epoch: the run's own for the first, then a mix of both numbers.

    `seed + epoch` would give epoch 1 of seed 0 the order of epoch 0 of seed 1.
    """
    if epoch == 0:
        return seed
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])


def teacher_runs(step: int, *, share: float, seed: int) -> bool:
    """Whether the teacher runs in this step (from 0): in a share of all steps, as evenly spaced as can be.

    The seed draws where the first one lies, so over seeds each step is as likely as any other.
    """
    start = random.Random(f"teacher {seed}").random()
    return math.floor(share * (step + 1) + start) > math.floor(share * step + start)


def order_of(train: TrainConfig, dataset: Any, world: int) -> Order:
    """The order of a run on `dataset`, by `world` processes."""
    size = train.batch_size * train.accumulation * world
    if isinstance(dataset, Stream):
        return InOrder(steps=train.total_steps, size=size)
    lengths = kinds = None
    if isinstance(dataset, Checked) and dataset.group is not Group.none:
        sizes = dataset.rows.sizes()
        lengths = [(images, characters) for characters, images in sizes]  # images outweigh text
        if dataset.group is Group.modality:
            kinds = [images > 0 for _, images in sizes]
    return Order(
        len(dataset), steps=train.total_steps, size=size, seed=train.seed, lengths=lengths, kinds=kinds
    )
