"""FSDP2 as the engine `accelerate` uses it: the arithmetic of DDP, in shards."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import Trainer

from latefusion.models.student.build import Student
from latefusion.training.teacher import OtherTeacher


def refuse_cpu() -> None:
    """Raise ValueError on a CPU."""
    if not torch.cuda.is_available():
        raise ValueError(
            "engine=fsdp2 needs GPUs: accelerate would run it as DDP; use engine=accelerate on a CPU."
        )


def plugin_args(student: Student) -> dict[str, Any]:
    """For accelerate's plugin: a unit is a decoder layer, weights stay as they are, gradients are summed in float32.

    By itself accelerate would look for the class names that a Llava gives, in vain; and cast what trains to bfloat16,
    and sum its gradients in it, where autocast under DDP does neither.
    """
    return {
        "transformer_cls_names_to_wrap": type(student.attachment.layers[0]).__name__,
        "mixed_precision_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
    }


def autocast(trainer: Trainer) -> torch.autocast:
    """What accelerate puts around every model but one in FSDP2's shards."""
    mixed = trainer.args.bf16 and trainer.is_fsdp_enabled
    return torch.autocast(trainer.args.device.type, torch.bfloat16, enabled=mixed)


def shard(teacher: OtherTeacher, device: torch.device) -> None:
    """A unit a decoder layer, and one for the rest."""
    teacher.model.to(device)
    for layer in teacher.attachment.layers:
        fully_shard(layer)
    fully_shard(teacher.model)
    register_fsdp_forward_method(
        teacher.model, "get_image_features"
    )  # batches without images call it by itself
