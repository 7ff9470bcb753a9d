"""The second engine: PyTorch Lightning, thin, on the same model, data and objective.

A step is a function of (seed, step) alone, its samples as well as its randomness, so a resumed run needs
no state of loaders or generators to continue bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from peft.helpers import disable_input_dtype_casting
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from torch.utils.data import DataLoader, Sampler
from transformers import get_scheduler

from latefusion.data.collate import IGNORE, Collator
from latefusion.models.build import Student, save_student
from latefusion.training.config import Config
from latefusion.training.objective import Objective
from latefusion.training.order import Order, order_of


def prepare(config: Config, *, dtype: torch.dtype) -> pl.Trainer:
    """Set the process up, as one of those that `accelerate launch` or `torchrun` started."""
    train = config.train
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=local,
        num_nodes=world // local,
        strategy="ddp" if world > 1 else "auto",
        precision="bf16-mixed" if dtype is torch.bfloat16 else "32-true",
        max_steps=train.steps,
        max_epochs=-1,
        logger=False,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[
            Checkpoints(config.output_dir, every=train.save_every, keep=train.keep_checkpoints),
            TQDMProgressBar(refresh_rate=train.log_every),
        ],
    )


def fit(
    config: Config,
    trainer: pl.Trainer,
    student: Student,
    dataset: Any,
    collator: Collator,
    objective: Objective,
) -> bool:
    """Train, and save the student to `output_dir`.

    Returns:
        Whether this is the main process.
    """
    if config.train.gradient_checkpointing:
        student.model.gradient_checkpointing_enable()
    resumed = last_checkpoint(config.output_dir) if config.resume else None
    done = torch.load(resumed, weights_only=False)["global_step"] if resumed else 0
    student.model.train()
    train = config.train

    def micro_batches(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [collator(samples[i : i + train.batch_size]) for i in range(0, len(samples), train.batch_size)]

    loader = DataLoader(
        dataset,
        batch_sampler=Steps(
            order_of(train, dataset, trainer.world_size),
            first=done,
            rank=trainer.global_rank,
            world=trainer.world_size,
            micro=train.batch_size,
        ),
        collate_fn=micro_batches,
        num_workers=train.workers,
        prefetch_factor=train.prefetch if train.workers else None,
    )
    with disable_input_dtype_casting(student.model, active=trainer.precision == "bf16-mixed"):
        trainer.fit(StudentModule(config, student, objective), loader, ckpt_path=resumed, weights_only=False)
    if trainer.is_global_zero:
        save_student(student, config.output_dir)
    return trainer.is_global_zero


def last_checkpoint(output_dir: str) -> str:
    """The newest checkpoint of a run.

    Raises:
        FileNotFoundError: there is none.
    """
    found = checkpoints(output_dir)
    if not found:
        raise FileNotFoundError(f"resume=true finds no checkpoint in {output_dir}; start the run without it.")
    return str(found[-1])


def checkpoints(output_dir: str) -> list[Path]:
    """Those of a run, the oldest first."""
    return sorted(Path(output_dir).glob("checkpoint-*.ckpt"), key=lambda p: int(p.stem.split("-")[1]))


class Checkpoints(Callback):
    """Saves every so many steps and at the end, and keeps the last few."""

    def __init__(self, folder: str, *, every: int, keep: int):
        self.folder, self.every, self.keep = folder, every, keep

    def on_train_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        step = trainer.global_step
        if step % self.every and step != trainer.max_steps:
            return
        trainer.save_checkpoint(Path(self.folder) / f"checkpoint-{step}.ckpt")
        if trainer.is_global_zero:
            for old in checkpoints(self.folder)[: -self.keep]:
                old.unlink()


class Steps(Sampler[list[int]]):
    """This process's sample indices for each step from `first` on."""

    def __init__(self, order: Order, *, first: int, rank: int, world: int, micro: int):
        self.order, self.first = order, first
        self.rank, self.world, self.micro = rank, world, micro

    def __len__(self) -> int:
        return self.order.steps - self.first

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.order.steps):
            yield sum(self.order.share(step, self.rank, self.world, self.micro), [])


class StudentModule(pl.LightningModule):
    """The objective over the micro-batches of a step; checkpoints hold what trains, not the base."""

    strict_loading = False

    def __init__(self, config: Config, student: Student, objective: Objective):
        super().__init__()
        self.automatic_optimization = False
        self.config, self.model, self.objective = config, student.model, objective
        self.weights = {n for n, p in self.named_parameters() if p.requires_grad}

    def configure_optimizers(self) -> Any:
        train = self.config.train
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            lr=train.learning_rate,
            betas=(0.9, train.adam_beta2),
            weight_decay=train.weight_decay,
        )
        warmup = round(train.warmup * train.steps)
        schedule = get_scheduler(train.scheduler, optimizer, warmup, train.steps)
        return [optimizer], [schedule]

    def training_step(self, batches: list[dict[str, Any]], index: int) -> None:
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        torch.manual_seed(hash((self.config.train.seed, self.global_step, self.global_rank)) % 2**63)
        count = torch.stack([(b["labels"] != IGNORE).sum() for b in batches]).sum()
        count = self.trainer.strategy.reduce(count, reduce_op="sum")
        optimizer.zero_grad()
        losses = []
        for batch in batches:
            loss, _ = self.objective(self.model, batch, count=count)
            self.manual_backward(loss * self.trainer.world_size)  # DDP averages over processes
            losses.append(loss.detach())
        self.clip_gradients(optimizer, self.config.train.max_grad_norm, "norm")
        optimizer.step()
        schedule.step()
        loss = self.trainer.strategy.reduce(torch.stack(losses).sum(), reduce_op="sum")
        self.log("loss", loss, prog_bar=True, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {n: w for n, w in checkpoint["state_dict"].items() if n in self.weights}
