"""Checks of a composed configuration's values; each error is one sentence that names the value and the fix."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from math import inf
from typing import Any

from omegaconf import DictConfig, OmegaConf

from latefusion.recipes.schema import (
    QUESTION_SETS,
    TRACKERS,
    Config,
    EntryInit,
    Group,
    NonFiniteStep,
    Source,
    Teacher,
    Trainer,
    Trust,
    Tune,
)


def check_config(cfg: DictConfig) -> Config:
    """Check a composed configuration and return it as a `Config`.

    Raises:
        ValueError: a value is missing or out of range.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if "model.path" in missing:
        raise ValueError("model.path is not set; model=other needs model.path=HUB_ID_OR_FOLDER.")
    for key in missing:
        raise ValueError(f"{key} is not set; add {key}=VALUE to the command line.")
    config: Config = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    _refuse_additions(config)
    if not config.name.strip():
        raise ValueError("name is empty; give one, such as name=late_fusion.")
    _check_numbers(config)
    _check_run(config)
    _check_data(config)
    _check_schedule(config)
    _check_engine(config)
    _check_weights(config)
    _check_teacher(config)
    return config


def _check_numbers(config: Config) -> None:
    """Refuse numbers out of their range."""
    train, lora, kl = config.train, config.lora, config.kl
    for key, value in (
        ("train.steps", 1 if train.steps is None else train.steps),
        ("train.batch_size", train.batch_size),
        ("train.accumulation", train.accumulation),
        ("train.log_every", train.log_every),
        ("train.save_every", train.save_every),
        ("train.keep_checkpoints", train.keep_checkpoints),
        ("lora.r", lora.r),
        ("lora.alpha", lora.alpha),
        ("eval.batch_size", config.eval.batch_size),
        ("kl.top_k", kl.top_k),
        ("data.turns", config.data.turns),
        ("data.shuffle_buffer", config.data.shuffle_buffer),
        ("data.max_length", config.data.max_length or 1),
        ("data.max_frames", config.data.max_frames),
        *((f"data.parts[{i}].max_frames", part.max_frames) for i, part in enumerate(config.data.parts)),
        ("train.prefetch", train.prefetch),
        ("entry.images", config.entry.images),
        ("entry.later_rank", config.entry.later_rank),
        ("schedule.samples", config.schedule.samples),
        ("schedule.confirm", config.schedule.confirm),
        ("train.threads", 1 if train.threads is None else train.threads),
        ("eval.samples", 1 if config.eval.samples is None else config.eval.samples),
        ("data.scenes", 1 if config.data.scenes is None else config.data.scenes),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{key}={value} must be at least 1.")
    for key, number in (
        ("train.learning_rate", train.learning_rate),
        ("train.epochs", 1 if train.epochs is None else train.epochs),
        ("train.max_grad_norm", train.max_grad_norm),
        ("kl.temperature", kl.temperature),
        ("schedule.bound", config.schedule.bound),
    ):
        if not 0 < number < inf:
            raise ValueError(f"{key}={number} must be positive and finite.")
    if not 0 < kl.share <= 1:
        raise ValueError(
            f"kl.share={kl.share} must be above 0 and at most 1; teacher=none trains without a teacher."
        )
    for key, number in (
        ("train.weight_decay", train.weight_decay),
        ("train.workers", train.workers),
        ("train.seed", train.seed),
        ("data.seed", config.data.seed),
        ("entry.rank", config.entry.rank),
        ("kl.weight", kl.weight),
    ):
        if not 0 <= number < inf:
            raise ValueError(f"{key}={number} must be finite and not negative.")
    for key, number in (
        ("train.warmup", train.warmup),
        ("train.adam_beta2", train.adam_beta2),
        ("lora.dropout", lora.dropout),
        ("data.noise", config.data.noise),
        ("train.narrow", 0.0 if train.narrow == 1 else train.narrow),
    ):
        if not 0 <= number < 1:
            raise ValueError(f"{key}={number} must lie in [0, 1).")
    if config.schedule.budget is not None and not 0 < config.schedule.budget <= 1:
        raise ValueError(
            f"schedule.budget={config.schedule.budget} is a fraction of dense FLOPs: above 0, at most 1."
        )


def _check_run(config: Config) -> None:
    """Refuse a run whose folder or length is unclear, or whose trackers are not there."""
    train = config.train
    if not config.output_dir:
        raise ValueError("output_dir is empty; name a folder with output_dir=FOLDER.")
    if config.resume is not False and config.overwrite:
        raise ValueError("resume=true and overwrite=true contradict each other; choose one.")
    if train.steps is not None and train.epochs is not None:
        raise ValueError(
            f"train.steps={train.steps} and train.epochs={train.epochs} both say how long to train; leave one out."
        )
    if train.steps is None and train.epochs is None:
        raise ValueError(
            "neither train.steps nor train.epochs says how long to train; add train.epochs=1 or train.steps=N."
        )
    for name in train.trackers:
        if name not in TRACKERS:
            raise ValueError(f"train.trackers names {name!r}; there are {', '.join(TRACKERS)}.")
        if name == "trackio" and config.engine.trainer is Trainer.lightning:
            raise ValueError(
                "train.trackers=trackio is not known to Lightning; use tensorboard or wandb, or engine=accelerate."
            )
        if name != "tensorboard" and not any(map(find_spec, TRACKERS[name])):
            raise ValueError(f"train.trackers={name} is not installed; pip install {name}.")


def _check_schedule(config: Config) -> None:
    """Refuse schedules that contradict how the run changes or shards them."""
    if config.schedule.cross is not None and config.train.narrow > 0:
        raise ValueError("schedule.cross leaves no band that train.narrow could narrow: use train.narrow=0.")
    if (
        config.schedule.ranking == "hidrop"
        and config.schedule.keep
        and (_is_zero3(config) or config.engine.fsdp)
    ):
        raise ValueError(
            "schedule.ranking=hidrop looks into a layer before it runs, which weights in shards (ZeRO-3, FSDP2) do not "
            "allow; use engine=deepspeed_zero2 or engine=accelerate."
        )


def _is_zero3(config: Config) -> bool:
    return (config.engine.deepspeed or {}).get("zero_optimization", {}).get("stage") == 3


def _check_engine(config: Config) -> None:
    """Refuse what an engine cannot do."""
    for key in ("deepspeed", "fsdp"):
        if getattr(config.engine, key) and config.engine.trainer is not Trainer.accelerate:
            raise ValueError(f"engine.{key} needs engine.trainer=accelerate.")
    if config.engine.deepspeed and config.train.on_nonfinite is NonFiniteStep.skip:
        raise ValueError(
            "train.on_nonfinite=skip cannot work with DeepSpeed, which takes the step before the check; use "
            "train.on_nonfinite=stop."
        )
    if config.model.load_in_4bit and _is_zero3(config):
        raise ValueError(
            "model.load_in_4bit=true does not go with ZeRO-3, which shards the weights; use ZeRO-2."
        )


def _check_weights(config: Config) -> None:
    """Refuse contradictions about which weights train."""
    lora = config.lora
    if lora.targets is not None and not lora.targets:
        raise ValueError(
            "lora.targets=[] names no layer; leave it out for every linear layer of the decoder."
        )
    if config.entry.init is EntryInit.calibrated and config.entry.rank == 0:
        raise ValueError(
            "entry.init=calibrated needs an entry adapter; set entry.rank to 1 or more, or entry.init=identity."
        )
    if config.tune is Tune.full and config.init is not None:
        raise ValueError(
            f"init={config.init} needs adapters to put its weights in, and tune=full trains the weights themselves; "
            "leave init out, or use tune=lora."
        )
    if config.tune is Tune.full and config.model.load_in_4bit:
        raise ValueError("tune=full trains the weights themselves: use model.load_in_4bit=false.")
    if lora.train_projector and config.model.projector is None:
        raise ValueError(
            "lora.train_projector=true needs model.projector=NAME, the projector's name in this model."
        )


def _check_teacher(config: Config) -> None:
    """Refuse teachers that could not teach."""
    kl = config.kl
    taught = config.teacher is not Teacher.none and kl.weight > 0
    if kl.cache is not None and not taught:
        raise ValueError(
            "kl.cache needs a teacher; use teacher=visipruner or teacher=dense with kl.weight above 0, or leave out "
            "kl.cache."
        )
    if config.tune is Tune.full and taught and kl.model is None:
        raise ValueError(
            f"tune=full changes the base, which is the teacher={config.teacher.value}; use teacher=none, tune=lora, or "
            "another model as the teacher, kl.model=PATH."
        )
    if kl.model is not None and not taught:
        raise ValueError(
            f"kl.model={kl.model} would teach nothing; use teacher=visipruner or teacher=dense with kl.weight above "
            "0, or leave out kl.model."
        )
    if kl.model is not None and kl.cache is None and config.engine.in_shards and kl.trust is Trust.auto:
        raise ValueError(
            f"kl.trust=auto cannot ask kl.model={kl.model} what it knows while its weights are in shards; say "
            "kl.trust=all, or write its answers first (training/teach.py, kl.cache)."
        )


def _check_data(config: Config) -> None:
    data = config.data
    if data.source in (Source.llava, Source.dataset) and data.path is None:
        raise ValueError(f"data.path is not set; name the {data.source.value} data with data.path=PATH.")
    if data.source is Source.mixture and not data.parts:
        raise ValueError("data.parts is empty; name the mixture's sources: data.parts=[{path: PATH}, ...].")
    for number, part in enumerate(data.parts):
        if part.source not in (Source.llava, Source.dataset):
            raise ValueError(f"data.parts[{number}].source={part.source.value} must be llava or dataset.")
        if not 0 < part.weight < float("inf"):
            raise ValueError(f"data.parts[{number}].weight={part.weight} must be positive and finite.")
    if data.pack and config.kl.model is not None and config.kl.cache is None:
        raise ValueError(
            "data.pack=true lays out rows for one model only: with kl.model use kl.cache, or data.pack=false."
        )
    if data.pack and data.isolate:
        raise ValueError("data.pack=true and data.isolate=true both lay out rows; set one of them to false.")
    if data.noise and data.source not in QUESTION_SETS:
        raise ValueError(
            f"data.noise={data.noise} is for data=scenes, icons or easy_vqa; change the answers in your own data."
        )
    if data.streaming and data.source in QUESTION_SETS:
        raise ValueError("data.streaming=true needs data to read: data=dataset or data=mixture.")
    if data.group is not Group.none and (data.streaming or data.source in QUESTION_SETS):
        raise ValueError(
            f"data.group={data.group.value} needs rows that can be measured: data=llava, dataset or mixture, "
            "and data.streaming=false."
        )


def _refuse_additions(node: Any, prefix: str = "") -> None:
    """Refuse keys that Hydra's `+key=value` has added to a typed node."""
    exists = sorted(f.name for f in fields(node))
    for name, value in vars(node).items():
        if name not in exists:
            raise ValueError(f"{prefix}{name} does not exist; there are {', '.join(exists)}.")
        if is_dataclass(value):
            _refuse_additions(value, f"{prefix}{name}.")
