"""Weights in shards: FSDP2 with the arithmetic of DDP, and where another teacher's weights lie under each engine."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import Trainer

from latefusion.models.student.build import Student
from latefusion.recipes.schema import Config
from latefusion.training.teacher import OtherTeacher


def refuse_cpu() -> None:
    """Raise ValueError on a CPU, where accelerate would silently replace FSDP2 by DDP."""
    if not torch.cuda.is_available():
        raise ValueError(
            "engine=fsdp2 needs GPUs: accelerate would run it as DDP; use engine=accelerate on a CPU."
        )


def plugin_args(student: Student) -> dict[str, Any]:
    """Settings for accelerate's FSDP plugin: a unit per decoder layer, weights as they are, gradients in float32.

    Accelerate's defaults would look in vain for the class names that a Llava gives, cast what trains to bfloat16, and
    sum its gradients in bfloat16. DDP under autocast does none of that.
    """
    return {
        "transformer_cls_names_to_wrap": type(student.attachment.layers[0]).__name__,
        "mixed_precision_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
    }


def autocast(trainer: Trainer) -> torch.autocast:
    """The autocast that accelerate puts around every model except one in FSDP2's shards."""
    mixed = trainer.args.bf16 and trainer.is_fsdp_enabled
    return torch.autocast(trainer.args.device.type, torch.bfloat16, enabled=mixed)


def place_teacher(config: Config, teacher: OtherTeacher, device: torch.device) -> None:
    """Put another teacher's weights where this engine keeps weights; call it once the processes are joined.

    ZeRO-3 sharded them while they were loaded, and gets an engine of its own that gathers them layer by layer. FSDP2
    shards them here. Under every other engine each process holds all of them.
    """
    teacher.sharded = config.engine.in_shards
    if config.engine.fsdp:
        shard_fsdp2(teacher, device)
    elif teacher.sharded:
        teacher.forward = wrap_zero3(config, teacher.model)
    else:
        teacher.model.to(device)


def shard_fsdp2(teacher: OtherTeacher, device: torch.device) -> None:
    """Shard a teacher: a unit per decoder layer, and one for the rest."""
    teacher.model.to(device)
    for layer in teacher.attachment.layers:
        fully_shard(layer)
    fully_shard(teacher.model)
    # batches without images call this method outside the forward
    register_fsdp_forward_method(teacher.model, "get_image_features")


def wrap_zero3(config: Config, model: Any) -> Any:
    """A ZeRO-3 engine without an optimizer around an already partitioned model."""
    import deepspeed  # lazy: slow to import, and only this engine needs it

    if not all(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise RuntimeError("ZeRO-3 was asked for, but the teacher's weights are whole in each process.")
    assert config.engine.deepspeed is not None
    # of the student's settings, leave out the optimizer's and those chosen by the student's size
    zero = {
        name: value
        for name, value in config.engine.deepspeed["zero_optimization"].items()
        if value != "auto" and name != "offload_optimizer"
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": config.train.batch_size,
            "zero_optimization": zero,
            "bf16": {"enabled": model.dtype is torch.bfloat16},
        },
    )
    engine.eval()
    return engine
