"""The main engine: Hugging Face `Trainer`, on what `accelerate launch` started (DDP, DeepSpeed)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from latefusion.data.collate import Collator
from latefusion.data.guard import skipped
from latefusion.models.build import Student, save_student
from latefusion.training.config import Config
from latefusion.training.objective import Objective
from latefusion.training.order import Order, order_of

ALONE = {  # DeepSpeed wants a process group even for the one process that a bare `accelerate launch` starts
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def prepare(config: Config, *, dtype: torch.dtype) -> TrainingArguments:
    """Set the process up; before any model is loaded, for ZeRO-3 shards weights as they load."""
    train = config.train
    cpu = not torch.cuda.is_available()
    if cpu:
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # Trainer imports DeepSpeed, which would guess, and warn
    if config.engine.deepspeed:
        for name, value in ALONE.items():
            os.environ.setdefault(name, value)
    args = TrainingArguments(
        output_dir=config.output_dir,
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler,
        warmup_steps=round(train.warmup * train.steps),
        weight_decay=train.weight_decay,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        bf16=dtype is torch.bfloat16,
        activation_checkpointing=train.gradient_checkpointing,
        dataloader_num_workers=train.workers,
        dataloader_prefetch_factor=train.prefetch if train.workers else None,
        accelerator_config={"dispatch_batches": False} if config.data.streaming else None,
        dataloader_pin_memory=not cpu,
        logging_steps=train.log_every,
        save_steps=train.save_every,
        save_total_limit=train.keep_checkpoints,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=cpu,
        report_to="none",
        deepspeed=config.engine.deepspeed,
    )
    if config.engine.deepspeed and cpu:
        import deepspeed  # slow to import, and only this engine needs it

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)  # accelerate omits it
    return args


def fit(
    config: Config,
    args: TrainingArguments,
    student: Student,
    dataset: Any,
    collator: Collator,
    objective: Objective,
) -> bool:
    """Train, and save the student to `output_dir`.

    Returns:
        Whether this is the main process.
    """
    trainer = StudentTrainer(
        model=student.model,
        args=args,
        train_dataset=dataset,
        data_collator=collator,
        student=student,
        objective=objective,
        order=order_of(config.train, dataset, args.world_size),
    )
    # under autocast LoRA's products run in bfloat16; PEFT would cast every input to the weights' float32
    with disable_input_dtype_casting(student.model, active=args.bf16):
        trainer.train(resume_from_checkpoint=last_checkpoint(config.output_dir) if config.resume else None)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return trainer.is_world_process_zero()


def last_checkpoint(output_dir: str) -> str:
    """The newest checkpoint of a run.

    Raises:
        FileNotFoundError: there is none.
    """
    found = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if found is None:
        raise FileNotFoundError(f"resume=true finds no checkpoint in {output_dir}; start the run without it.")
    return found


class StudentTrainer(Trainer):
    """`Trainer` with our objective, its terms in the log, and checkpoints that `latefusion.load` reads."""

    def __init__(self, *, student: Student, objective: Objective, order: Order, **kwargs: Any):
        super().__init__(**kwargs)
        self.student, self.objective, self.order = student, objective, order
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the whole step
        self.terms: dict[str, Tensor] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        assert num_items_in_batch is not None
        loss, terms = self.objective(model, inputs, count=num_items_in_batch)
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0) + value
        return loss * self.accelerator.num_processes  # DDP and DeepSpeed average over processes

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.terms:
            total = self.accelerator.reduce(torch.stack([value.float() for value in self.terms.values()]))
            sums = dict(zip(self.terms, total.tolist(), strict=True))
            logs |= {name: sums[name] / sums["tokens"] for name in ("ce", "kl")}
            self.terms = {}
            if left_out := skipped(self.args.output_dir):
                logs["skipped_rows"] = left_out
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            save_student(self.student, output_dir or self.args.output_dir, state_dict)
