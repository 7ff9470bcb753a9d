"""What every engine watches a run with, from the same configuration: its steps, and its rates."""

from __future__ import annotations

from typing import Any

import torch

from latefusion.models.student.build import Student
from latefusion.recipes.schema import Config, NonFiniteStep
from latefusion.training.monitor import Monitor
from latefusion.training.nonfinite import Watch
from latefusion.training.order import Order


def watch_of(
    config: Config, dataset: Any, order: Order, *, rank: int, world: int, student: Student | None
) -> Watch:
    """See `Watch`; `student` None: its weights are in shards."""
    return Watch(
        config.output_dir,
        dataset=dataset,
        order=order,
        rank=rank,
        world=world,
        micro=config.train.batch_size,
        skip=config.train.on_nonfinite is NonFiniteStep.skip,
        student=student,
    )


def monitor_of(config: Config, order: Order, *, first: int, dtype: torch.dtype, main: bool) -> Monitor:
    """See `Monitor`."""
    return Monitor(
        config.output_dir,
        name=config.name,
        steps=config.train.steps,
        first=first,
        samples=order.size,
        dtype=dtype,
        main=main,
    )
