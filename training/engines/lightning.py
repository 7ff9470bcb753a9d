"""The second engine: PyTorch Lightning, a thin layer over the same model, data and objective.

The samples and the randomness of a step depend on (seed, step) alone, so a resumed run continues bit for bit without
any state of loaders or generators.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from peft.helpers import disable_input_dtype_casting
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, get_scheduler

from latefusion.data.bad_rows import skipped
from latefusion.data.collate import IGNORE, Collator
from latefusion.models.student.build import Student
from latefusion.models.student.save import save_student
from latefusion.recipes.launcher import local_world_size, rank, world_size
from latefusion.recipes.schema import Config
from latefusion.training.checkpoints import step_of, writing, writing_result
from latefusion.training.engines.sharding import place_teacher
from latefusion.training.monitor import Monitor, per_token, trackers
from latefusion.training.nonfinite import Watch
from latefusion.training.objective import Objective
from latefusion.training.order import Order, order_of
from latefusion.training.signals import Preempted, Signals, check_world

STATE = "lightning.ckpt"


def prepare(config: Config, *, dtype: torch.dtype) -> pl.Trainer:
    """Set up the process, one of those that `accelerate launch` or `torchrun` started."""
    train = config.train
    world = world_size()
    local = local_world_size()
    return pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=local,
        num_nodes=world // local,
        strategy=DDPStrategy(broadcast_buffers=False) if world > 1 else "auto",
        precision="bf16-mixed" if dtype is torch.bfloat16 else "32-true",
        max_steps=train.total_steps,
        max_epochs=-1,
        logger=[logger(name, config) for name in trackers(train.trackers, main=rank() == 0)],
        log_every_n_steps=train.log_every,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        enable_progress_bar=False,  # `Monitor` shows the progress
    )


def logger(name: str, config: Config) -> Logger:
    """Lightning's logger for TensorBoard or W&B; `recipes/check.py` refuses others."""
    if name == "tensorboard":
        return TensorBoardLogger(config.output_dir, name="runs", version="")
    return WandbLogger(name=config.name, save_dir=config.output_dir)


def fit(
    config: Config,
    trainer: pl.Trainer,
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
        Preempted: a signal stopped the run, and a checkpoint was saved.
        NonFinite, CannotSave: the message is one sentence.
    """
    if config.train.gradient_checkpointing:
        student.model.gradient_checkpointing_enable()
    student.model.train()
    train = config.train
    order = order_of(train, dataset, trainer.world_size)
    first = 0 if resumed is None else step_of(resumed)
    watch = Watch.of(
        config, dataset, order, rank=trainer.global_rank, world=trainer.world_size, student=student
    )
    monitor = Monitor.of(
        config,
        order,
        first=first,
        dtype=torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32,
        main=trainer.is_global_zero,
    )
    objective.counts = monitor.peak is not None
    if objective.kl.other is not None:
        place_teacher(config, objective.kl.other, trainer.strategy.root_device)
    module = StudentModule(config, student, objective, order, watch, monitor)
    life = Life(config, student, order, monitor)
    trainer.callbacks.append(life)  # type: ignore[attr-defined]

    def micro_batches(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [collator(samples[i : i + train.batch_size]) for i in range(0, len(samples), train.batch_size)]

    loader = DataLoader(
        dataset,
        batch_sampler=Steps(
            order,
            first=first,
            rank=trainer.global_rank,
            world=trainer.world_size,
            micro=train.batch_size,
        ),
        collate_fn=micro_batches,
        num_workers=train.workers,
        prefetch_factor=train.prefetch if train.workers else None,
    )
    try:
        with disable_input_dtype_casting(student.model, active=trainer.precision == "bf16-mixed"):
            path = None if resumed is None else resumed / STATE
            with warnings.catch_warnings():  # the frozen vision tower is meant to be in eval mode
                warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")
                trainer.fit(module, loader, ckpt_path=path, weights_only=True)
    finally:
        life.signals.close()
        monitor.close()
    if life.preempted:
        raise Preempted(trainer.global_step)
    barrier = trainer.strategy.barrier
    with writing_result(config.output_dir, main=trainer.is_global_zero, barrier=barrier) as folder:
        if trainer.is_global_zero:
            save_student(student, folder)
    return trainer.is_global_zero


class Life(Callback):
    """Around the steps: check the processes, save checkpoints, listen for signals."""

    def __init__(self, config: Config, student: Student, order: Order, monitor: Monitor):
        self.config, self.student, self.order, self.monitor = config, student, order, monitor
        self.signals = Signals()
        self.preempted = False

    def on_train_start(self, trainer: pl.Trainer, *unused: Any) -> None:
        check_world(trainer.world_size)
        self.signals.listen()  # instead of Lightning's own handlers

    def on_train_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        step = trainer.global_step
        self.monitor.step(step)
        stopping = self.signals.stop(trainer.strategy.root_device) and step < trainer.max_steps
        if stopping:
            self.preempted = trainer.should_stop = True
        if step % self.config.train.save_every == 0 or step == trainer.max_steps or stopping:
            self.save(trainer, step)

    def save(self, trainer: pl.Trainer, step: int) -> None:
        with writing(
            self.config.output_dir,
            step,
            samples=self.order.size,
            keep=self.config.train.keep_checkpoints,
            main=trainer.is_global_zero,
            barrier=trainer.strategy.barrier,
        ) as folder:
            trainer.save_checkpoint(folder / STATE, weights_only=False)
            if trainer.is_global_zero:
                save_student(self.student, folder)


class Steps(Sampler[list[int]]):
    """This process's sample indices for each step from `first` on.

    Its length is that of the whole run, which Lightning sees as one epoch: a resumed loop counts the batches before
    `first` as done.
    """

    def __init__(self, order: Order, *, first: int, rank: int, world: int, micro: int):
        self.order, self.first = order, first
        self.rank, self.world, self.micro = rank, world, micro

    def __len__(self) -> int:
        return self.order.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.order.steps):
            share = self.order.share(step, self.rank, self.world, self.micro)
            yield [index for batch in share for index in batch]


class StudentModule(pl.LightningModule):
    """The objective over the micro-batches of a step; checkpoints hold the trained weights, not the base."""

    strict_loading = False

    def __init__(
        self,
        config: Config,
        student: Student,
        objective: Objective,
        order: Order,
        watch: Watch,
        monitor: Monitor,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.config, self.model, self.objective = config, student.model, objective
        self.order, self.watch, self.monitor = order, watch, monitor
        self.pad = student.processor.tokenizer.pad_token_id
        self.sums: dict[str, torch.Tensor] = {}
        self.weights = {n for n, p in self.named_parameters() if p.requires_grad}

    def configure_optimizers(self) -> Any:
        train = self.config.train
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        decayed = set(Trainer.get_decay_parameter_names(None, self.model))  # type: ignore[arg-type]  # of no trainer's own
        groups = [
            {
                "params": [p for name, p in trained.items() if name in decayed],
                "weight_decay": train.weight_decay,
            },
            {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=(0.9, train.adam_beta2))
        warmup = round(train.warmup * train.total_steps)
        schedule = get_scheduler(train.scheduler.value, optimizer, warmup, train.total_steps)
        return [optimizer], [schedule]

    def training_step(self, batches: list[dict[str, Any]], index: int) -> None:
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        train, step, strategy = self.config.train, self.global_step, self.trainer.strategy
        torch.manual_seed(hash((train.seed, step, self.global_rank)) % 2**63)
        self.watch.begin()
        self.objective.at(step, train.total_steps)
        count = torch.stack([(b["labels"] != IGNORE).sum() for b in batches]).sum()
        count = strategy.reduce(count, reduce_op="sum")
        optimizer.zero_grad()
        for batch in batches:
            loss, terms = self.objective(self.model, batch, count=count)
            self.watch.saw(batch, loss, count)
            self.manual_backward(loss * self.trainer.world_size)  # undo the average that DDP takes
            terms |= {"loss": loss.detach(), "read": (batch["input_ids"] != self.pad).sum()}
            self.sums = {name: self.sums.get(name, 0) + value for name, value in terms.items()}
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), train.max_grad_norm)
        if not self.watch.passes(step, norm):
            optimizer.zero_grad()  # to None: the optimizer skips weights without a gradient
        optimizer.step()
        rate = schedule.get_last_lr()[0]
        schedule.step()
        if (step + 1) % train.log_every == 0 or step + 1 == train.total_steps:
            self.report(step + 1, norm.item(), rate)

    def report(self, done: int, norm: float, rate: float) -> None:
        """Log the steps since the last report, over all processes."""
        total = self.trainer.strategy.reduce(
            torch.stack([v.float() for v in self.sums.values()]), reduce_op="sum"
        )
        sums = dict(zip(self.sums, total.tolist(), strict=True))
        self.sums = {}
        steps = done - self.monitor.last
        logs = {"loss": sums["loss"] / steps, "grad_norm": norm, "learning_rate": rate}
        logs["epoch"] = self.order.epoch(done)
        logs |= per_token(sums)
        logs |= self.monitor.rates(done, sums["read"], sums.get("flops", 0.0))
        if left_out := skipped(self.config.output_dir):
            logs["skipped_rows"] = left_out
        self.log_dict(logs, rank_zero_only=True)
        self.monitor.log(done, logs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {n: w for n, w in checkpoint["state_dict"].items() if n in self.weights}
