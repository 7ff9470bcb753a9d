"""The main engine: Hugging Face `Trainer`, on the processes of `accelerate launch` (DDP, DeepSpeed, FSDP2)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from latefusion.data.bad_rows import skipped
from latefusion.data.collate import Collator
from latefusion.models.student.build import Student
from latefusion.models.student.save import save_student, spare_deepspeed_the_guess
from latefusion.models.student.whole import load_entry
from latefusion.recipes.launcher import rank
from latefusion.recipes.schema import Config, NonFiniteStep
from latefusion.training.checkpoints import writing, writing_result
from latefusion.training.engines import sharding
from latefusion.training.monitor import Monitor, per_token, trackers
from latefusion.training.nonfinite import Watch
from latefusion.training.objective import Objective
from latefusion.training.order import Order, order_of
from latefusion.training.signals import Preempted, Signals, check_world

ALONE = {  # the process group of one process: a bare `accelerate launch` sets none, and DeepSpeed needs one
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",  # any free port: two runs on one machine must not meet
}


def prepare(config: Config, *, dtype: torch.dtype) -> TrainingArguments:
    """Set up the process, before any model is loaded: ZeRO-3 shards weights as they load.

    Raises:
        ValueError: this machine cannot run the engine, or each process would train by itself.
    """
    train = config.train
    cpu = not torch.cuda.is_available()
    spare_deepspeed_the_guess()
    if config.engine.fsdp:
        sharding.refuse_cpu()
    if config.engine.deepspeed:
        for name, value in ALONE.items():
            os.environ.setdefault(name, value)
    args = TrainingArguments(
        output_dir=config.output_dir,
        max_steps=train.total_steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler.value,
        warmup_steps=round(train.warmup * train.total_steps),
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
        ddp_broadcast_buffers=False,  # no buffer changes
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
        import deepspeed  # lazy: slow to import, and only this engine needs it

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)  # accelerate omits it
    check_world(args.world_size)
    args._n_gpu = min(1, args.n_gpu)  # one process, one GPU: `Trainer` would wrap the model in DataParallel
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
        Preempted: a signal stopped the run, and a checkpoint was saved.
        NonFinite, CannotSave: the message is one sentence.
    """
    if config.engine.fsdp:
        args.fsdp_plugin_args.update(sharding.plugin_args(student))
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
    if objective.kl.other is not None:
        sharding.place_teacher(config, objective.kl.other, args.device)
    # under autocast LoRA multiplies in bfloat16; PEFT would cast every input to the weights' float32
    with trainer.life, disable_input_dtype_casting(student.model, active=args.bf16):
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    main, barrier = trainer.is_world_process_zero(), trainer.accelerator.wait_for_everyone
    if trainer.life.preempted:
        raise Preempted(trainer.state.global_step)
    with writing_result(config.output_dir, main=main, barrier=barrier) as folder:
        trainer.save_model(str(folder))
    return main


def give_up_masters(model: nn.Module) -> None:
    """Convert what trains to bfloat16: DeepSpeed keeps its own float32 masters, and runs without autocast.

    ZeRO-2 does so by itself. ZeRO-3 does not: it sharded the base while loading, and counts all weights as converted.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


class StudentTrainer(Trainer):
    """`Trainer` with this project's objective, order of samples and checkpoints, which `latefusion.load` reads."""

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
        self.watch = Watch.of(
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
        self.objective.at(self.state.global_step, self.args.max_steps)
        with sharding.autocast(self):
            loss, terms = self.objective(model, inputs, count=num_items_in_batch)
        self.watch.saw(inputs, loss, num_items_in_batch)
        terms["read"] = (inputs["input_ids"] != self.pad).sum()
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0) + value
        return loss * self.accelerator.num_processes  # undo the average that DDP and DeepSpeed take

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if self.watch.passes(self.state.global_step, norm):
            return norm
        model.zero_grad()  # to None: the optimizer skips weights without a gradient
        return 0.0

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.terms:
            total = self.accelerator.reduce(torch.stack([value.float() for value in self.terms.values()]))
            sums = dict(zip(self.terms, total.tolist(), strict=True))
            logs |= per_token(sums)
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
    """Around the steps: check the strategy, listen for signals, write the log."""

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
        self.monitor = Monitor.of(
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
    """Check that the model is wrapped as the engine says, so that the processes train as one.

    Raises:
        RuntimeError: it is not.
    """
    engine, model = trainer.config.engine, trainer.model_wrapped
    processes = trainer.args.world_size
    if engine.deepspeed:
        stage = engine.deepspeed["zero_optimization"]["stage"]
        strategy = f"ZeRO-{stage}"
        applied = trainer.is_deepspeed_enabled and model.zero_optimization_stage() == stage  # type: ignore[operator]
    elif engine.fsdp:
        strategy, applied = "FSDP2", isinstance(model, FSDPModule)
    elif processes > 1:
        strategy, applied = "DDP", isinstance(model, DistributedDataParallel)
    else:
        strategy, applied = "One process on one device", not isinstance(model, nn.DataParallel)
    if not applied:
        raise RuntimeError(
            f"{strategy} was asked for, but the model is a {type(model).__name__} in each of {processes} process(es); "
            "check the launcher's settings (accelerate env)."
        )
