"""Where another model that teaches (`kl.model`) lies: whole on each device, or in shards of its own engine."""

from __future__ import annotations

from typing import Any

import torch

from latefusion.recipes.schema import Config
from latefusion.training.assemble import in_shards
from latefusion.training.engines import sharding as fsdp
from latefusion.training.teacher import OtherTeacher


def settle_teacher(config: Config, teacher: OtherTeacher, device: torch.device) -> None:
    """Put the teacher where this engine keeps its weights; it is loaded, and the processes know each other.

    ZeRO-3 has sharded its weights while they were loaded, and gets an engine of its own that gathers them layer by
    layer; FSDP2 shards them here. Elsewhere each process holds all of them.
    """
    teacher.sharded = in_shards(config)
    if config.engine.fsdp:
        fsdp.shard(teacher, device)
    elif teacher.sharded:
        teacher.forward = zero3(config, teacher.model)
    else:
        teacher.model.to(device)


def zero3(config: Config, model: Any) -> Any:
    """A ZeRO-3 engine without an optimizer around an already partitioned model."""
    import deepspeed  # slow to import, and only this engine needs it

    if not all(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise RuntimeError("ZeRO-3 was asked for, but the teacher's weights are whole in each process.")
    assert config.engine.deepspeed is not None
    given = config.engine.deepspeed["zero_optimization"]
    settings = {  # of the student's engine; the optimizer's, and what it chooses by the student's size, do not matter
        name: value for name, value in given.items() if value != "auto" and name != "offload_optimizer"
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": config.train.batch_size,
            "zero_optimization": settings,
            "bf16": {"enabled": model.dtype is torch.bfloat16},
        },
    )
    engine.eval()
    return engine
