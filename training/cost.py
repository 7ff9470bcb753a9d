"""What a training step costs, from the schedule alone."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from transformers import PretrainedConfig

from latefusion.data.collate import Collator
from latefusion.data.mixing import Stream
from latefusion.models.build import Student
from latefusion.models.policies.base import Policy
from latefusion.models.schedule import VisionSchedule


def training_flops(
    config: PretrainedConfig, schedule: VisionSchedule, n_text: int, n_vision: int, *, teacher: bool = False
) -> int:
    """FLOPs of the decoder for one sample's step of LoRA training.

    The forward pass, and as much again backward: frozen weights need no gradient of their own, adapters hardly count. A
    teacher in the loop adds a dense forward pass, which is what `VisiPruner`, that decides at run time, costs at most.

    Args:
        config: the model's.
        n_text, n_vision: tokens of the sample.
    """
    step = 2 * schedule.flops(config, n_text, n_vision)
    return step + teacher * VisionSchedule().flops(config, n_text, n_vision)


def sample_flops(student: Student, teacher: Policy | None, dataset: Any, collator: Collator) -> float:
    """`training_flops` of a sample, from the data set's first few; for rates on a GPU (0 without one)."""
    if not torch.cuda.is_available():
        return 0.0
    first = (
        islice(dataset, 8)
        if isinstance(dataset, Stream)
        else map(dataset.__getitem__, range(min(8, len(dataset))))
    )
    samples = list(first)
    ids, config = collator(samples)["input_ids"], student.model.config
    vision = int((ids == config.image_token_id).sum()) // len(samples)
    real = int((ids != student.processor.tokenizer.pad_token_id).sum()) // len(samples)
    return training_flops(config, student.schedule, real - vision, vision, teacher=teacher is not None)
