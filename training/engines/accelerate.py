"""The main engine: Hugging Face `Trainer`, on what `accelerate launch` started (DDP, DeepSpeed, FSDP2)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import TrainingArguments

from latefusion.data.collate import Collator
from latefusion.models.student.build import Student
from latefusion.models.student.save import spare_deepspeed_the_guess
from latefusion.recipes.launcher import rank
from latefusion.recipes.schema import Config, NonFiniteStep
from latefusion.training.checkpoints import writing_result
from latefusion.training.engines import sharding as fsdp
from latefusion.training.engines.teachers import settle_teacher
from latefusion.training.engines.trainer import StudentTrainer
from latefusion.training.monitor import trackers
from latefusion.training.objective import Objective
from latefusion.training.signals import Preempted, check_world

ALONE = {  # DeepSpeed wants a process group even for the one process that a bare `accelerate launch` starts
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",  # any free one: nobody else has to find it, and two runs on a machine must not meet
}


def prepare(config: Config, *, dtype: torch.dtype) -> TrainingArguments:
    """Set the process up; before any model is loaded, for ZeRO-3 shards weights as they load.

    Raises:
        ValueError: this machine cannot run the engine, or the processes would train apart.
    """
    train = config.train
    cpu = not torch.cuda.is_available()
    spare_deepspeed_the_guess()
    if config.engine.fsdp:
        fsdp.refuse_cpu()
    if config.engine.deepspeed:
        for name, value in ALONE.items():
            os.environ.setdefault(name, value)
    args = TrainingArguments(
        output_dir=config.output_dir,
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler.value,
        warmup_steps=round(train.warmup * train.steps),
        weight_decay=train.weight_decay,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        bf16=dtype is torch.bfloat16,
        activation_checkpointing=train.gradient_checkpointing,
        dataloader_num_workers=train.workers,
        dataloader_prefetch_factor=train.prefetch if train.workers else None,
        dataloader_pin_memory=not cpu,
        logging_steps=train.log_every,
        save_steps=train.save_every,
        save_total_limit=train.keep_checkpoints,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # none changes
        use_cpu=cpu,
        logging_nan_inf_filter=train.on_nonfinite is NonFiniteStep.skip,  # else `Watch` stops the run
        report_to=trackers(train.trackers, main=rank() == 0) or "none",
        run_name=config.name,
        disable_tqdm=True,  # `Monitor` shows the progress
        deepspeed=config.engine.deepspeed,
        fsdp=bool(config.engine.fsdp),  # type: ignore[arg-type]
        fsdp_config=config.engine.fsdp,
    )
    if config.engine.deepspeed and cpu:
        import deepspeed  # slow to import, and only this engine needs it

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)  # accelerate omits it
    check_world(args.world_size)
    return args


def fit(
    config: Config,
    args: TrainingArguments,
    student: Student,
    dataset: Any,
    collator: Collator,
    objective: Objective,
    resumed: Path | None,
) -> bool:
    """Train, and save the student to `output_dir`.

    Args:
        resumed: the checkpoint to go on from.

    Returns:
        Whether this is the main process.

    Raises:
        Preempted: a signal stopped the run, after a checkpoint.
        NonFinite, CannotSave: in one sentence.
    """
    if config.engine.fsdp:
        args.fsdp_plugin_args.update(fsdp.plugin_args(student))
    if config.engine.deepspeed and args.bf16:
        give_up_masters(student.model)
    trainer = StudentTrainer(
        config=config,
        model=student.model,
        args=args,
        train_dataset=dataset,
        data_collator=collator,
        student=student,
        objective=objective,
    )
    if objective.other is not None:
        settle_teacher(config, objective.other, args.device)
    # under autocast LoRA's products run in bfloat16; PEFT would cast every input to the weights' float32
    with trainer.life, disable_input_dtype_casting(student.model, active=args.bf16):
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    main, barrier = trainer.is_world_process_zero(), trainer.accelerator.wait_for_everyone
    if trainer.life.preempted:
        raise Preempted(trainer.state.global_step)
    with writing_result(config.output_dir, main=main, barrier=barrier) as folder:
        trainer.save_model(str(folder))
    return main


def give_up_masters(model: nn.Module) -> None:
    """Put what trains into bfloat16: DeepSpeed keeps float32 masters of its own, and runs without autocast.

    ZeRO-2 would do so itself; ZeRO-3 takes weights for converted that it has sharded while the base was loaded, and
    the others with them.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
