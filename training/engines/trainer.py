"""Hugging Face's `Trainer` with our objective, order, checkpoints and log, and what happens around its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, Trainer, TrainerCallback

from latefusion.data.bad_rows import skipped
from latefusion.models.student.build import Student
from latefusion.models.student.save import load_entry, save_student
from latefusion.recipes.schema import Config
from latefusion.training.checkpoints import writing
from latefusion.training.engines import sharding as fsdp
from latefusion.training.engines.instruments import monitor_of, watch_of
from latefusion.training.monitor import Monitor
from latefusion.training.objective import Objective
from latefusion.training.order import Order, order_of
from latefusion.training.signals import Signals


class StudentTrainer(Trainer):
    """`Trainer` with our objective and order, its terms in the log, and whole checkpoints that `load` reads."""

    def __init__(self, *, config: Config, student: Student, objective: Objective, **kwargs: Any):
        super().__init__(**kwargs)
        args = self.args
        self.config, self.student = config, student
        self.objective: Objective = objective
        self.order = order_of(config.train, self.train_dataset, args.world_size)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the whole step
        self.terms: dict[str, Tensor] = {}
        self.staging: Path | None = None
        self.pad = student.processor.tokenizer.pad_token_id
        whole = isinstance(student.model, PeftModel) and not (
            self.is_deepspeed_enabled or self.is_fsdp_enabled
        )
        self.watch = watch_of(
            config,
            self.train_dataset,
            self.order,
            rank=args.process_index,
            world=args.world_size,
            student=student if whole else None,
        )
        self.remove_callback(PrinterCallback)  # `Monitor` prints
        self.life = Life(self)
        self.add_callback(self.life)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        assert num_items_in_batch is not None
        self.objective.at(self.state.global_step / self.args.max_steps)
        with fsdp.autocast(self):
            loss, terms = self.objective(model, inputs, count=num_items_in_batch)
        self.watch.saw(inputs, loss, num_items_in_batch)
        terms["read"] = (inputs["input_ids"] != self.pad).sum()
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0) + value
        return loss * self.accelerator.num_processes  # DDP and DeepSpeed average over processes

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if self.watch.passes(self.state.global_step, norm):
            return norm
        model.zero_grad()  # to None: the optimizer passes over such weights
        return 0.0

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.terms:
            total = self.accelerator.reduce(torch.stack([value.float() for value in self.terms.values()]))
            sums = dict(zip(self.terms, total.tolist(), strict=True))
            logs |= {name: sums[name] / sums["tokens"] for name in ("ce", "kl")}
            assert self.life.monitor is not None
            logs |= self.life.monitor.rates(self.state.global_step, sums["read"], sums.get("flops", 0.0))
            self.terms = {}
            if left_out := skipped(self.args.output_dir):
                logs["skipped_rows"] = left_out
        super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any = None) -> str:
        return self.config.output_dir if self.staging is None else str(self.staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        with writing(
            self.config.output_dir,
            self.state.global_step,
            samples=self.order.size,
            keep=self.config.train.keep_checkpoints,
            main=self.is_world_process_zero(),
            barrier=self.accelerator.wait_for_everyone,
        ) as folder:
            self.staging = folder.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.staging = None
            self.accelerator.wait_for_everyone()
            states = len(list(folder.glob("rng_state*")))
            if self.is_world_process_zero() and states < self.args.world_size:
                raise OSError(
                    f"{states} of {self.args.world_size} processes write into this folder: all nodes must share it"
                )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not isinstance(self.student.model, PeftModel):
            load_entry(self.student.model, resume_from_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            save_student(self.student, output_dir or self.args.output_dir, state_dict)


class Life(TrainerCallback):
    """What happens around steps: the check of the strategy, signals, the console."""

    def __init__(self, trainer: StudentTrainer):
        self.trainer = trainer
        self.signals = Signals()
        self.monitor: Monitor | None = None
        self.preempted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, student = self.trainer, self.trainer.student
        check_strategy(trainer)
        if trainer.is_fsdp_enabled:  # the objective encodes images outside the student's forward
            register_fsdp_forward_method(student.model, "get_image_features")
        self.monitor = monitor_of(
            trainer.config,
            trainer.order,
            first=state.global_step,
            dtype=torch.bfloat16 if args.bf16 else torch.float32,
            main=state.is_world_process_zero,
        )
        trainer.objective.counts = self.monitor.peak is not None
        self.signals.listen()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.watch.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = self.trainer.order.epoch(state.global_step)
        assert self.monitor is not None
        self.monitor.step(state.global_step)
        if self.signals.stop(args.device) and state.global_step < state.max_steps:
            self.preempted = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        assert self.monitor is not None
        self.monitor.log(state.global_step, logs)

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *exception: object) -> None:
        self.signals.close()
        if self.monitor is not None:
            self.monitor.close()


def check_strategy(trainer: StudentTrainer) -> None:
    """Raise if the model is not wrapped as this engine wraps it: its processes would train apart.

    Raises:
        RuntimeError: in one sentence.
    """
    engine, model = trainer.config.engine, trainer.model_wrapped
    if engine.deepspeed:
        wanted, found = "DeepSpeed", trainer.is_deepspeed_enabled
        if found:
            stage = engine.deepspeed["zero_optimization"]["stage"]
            wanted, found = f"ZeRO-{stage}", model.zero_optimization_stage() == stage  # type: ignore[operator]
    elif engine.fsdp:
        wanted, found = "FSDP2", isinstance(model, FSDPModule)
    else:
        wanted, found = "DDP", trainer.args.world_size == 1 or isinstance(model, DistributedDataParallel)
    if not found:
        raise RuntimeError(
            f"{wanted} was asked for, but the model is a plain {type(model).__name__} in each of "
            f"{trainer.args.world_size} process(es); check the launcher's settings (accelerate env)."
        )
