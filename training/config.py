"""What `training/train.py` can be told: typed, composed from `recipes/`, checked before any compute."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

RECIPES = Path(__file__).parent.parent / "recipes"


class Teacher(Enum):
    """The policy of the teacher (the same weights, adapters off); `none`: no distillation."""

    visipruner = "visipruner"
    dense = "dense"
    none = "none"


class Source(Enum):
    """`scenes`: rendered here; `llava`: a LLaVA conversation JSON; `dataset`: columns messages and images;
    `mixture`: several of the last two, by weight."""

    scenes = "scenes"
    llava = "llava"
    dataset = "dataset"
    mixture = "mixture"


OnError = Enum("OnError", {"skip": "skip", "raise": "raise"})
"""What a row that cannot be used means: another takes its place and it is counted, or the run stops."""


class Group(Enum):
    """What the samples of a step have in common; `modality`: all with images or all without, and then length."""

    none = "none"
    length = "length"
    modality = "modality"


class Tune(Enum):
    """What trains: `lora`: adapters on the decoder, entry adapter, and the projector if `lora.train_projector`;
    `align`: projector and entry adapter alone; `full`: decoder, output head, projector and entry adapter, no adapters,
    and so no base to teach (`teacher=none`)."""

    lora = "lora"
    align = "align"
    full = "full"


class Variant(Enum):
    """`rslora`: arXiv 2312.03732; `dora`: arXiv 2402.09353."""

    lora = "lora"
    rslora = "rslora"
    dora = "dora"


class Layers(Enum):
    """Decoder layers with LoRA: `all`, or the `busy` ones, which see vision tokens under the schedule."""

    all = "all"
    busy = "busy"


class EntryKind(Enum):
    """Of the entry adapter; `scale`: one factor a channel, `low_rank`: that and a low-rank map."""

    none = "none"
    scale = "scale"
    low_rank = "low_rank"


class Trainer(Enum):
    accelerate = "accelerate"
    lightning = "lightning"


class Dtype(Enum):
    """`auto`: bfloat16 where the hardware computes in it, else float32."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class NonFiniteStep(Enum):
    """What to do with a step whose loss or gradient is not a number."""

    stop = "stop"
    skip = "skip"


@dataclass
class ScheduleConfig:
    """A `VisionSchedule`; layers count from 0.

    `keep` is `{layer: k}`; untyped, so that an override replaces all of it.
    """

    enter: int = 0
    exit: int | None = None
    keep: Any = None


@dataclass
class RunScheduleConfig(ScheduleConfig):
    """The schedule of the run; a profile's replaces `enter`, `exit` and `keep` (docs/profile.md).

    Attributes:
        auto: `schedule=auto`: profile the model before training (or read `profile`).
        profile: folder that `eval/profile.py` wrote.
        samples, bound, budget: of the profile that `auto` makes.
    """

    auto: bool = False
    profile: str | None = None
    samples: int = 64
    bound: float = 0.05
    budget: float | None = None


@dataclass
class VisiPrunerConfig:
    """The arguments of `VisiPruner`; the paper's values for LLaVA-1.5-7B."""

    boundary: int = 6
    layer_threshold: float = 0.995
    tokens_threshold: float = 0.2
    exit_threshold: float = 0.999
    exit_patience: int = 2
    stages: list[str] = field(default_factory=lambda: ["shallow", "middle", "deep"])
    sink_rule: str = "first"


@dataclass
class ModelConfig:
    """A base model, and what is known of where it fuses.

    Attributes:
        path: `embedded`, a hub id, or a local folder.
        revision: branch, tag or commit of a hub id; None: its main branch.
        processor: settings that the processor is loaded with (`max_pixels`, `crop_to_patches`, ...).
        load_in_4bit: hold the decoder in 4 bits (QLoRA); needs bitsandbytes.
        trust_remote_code: run code that comes with the weights.
        attention: the implementation to train with (`eager`, `sdpa`, `flash_attention_2`); None: the
            model's default.
        projector: name of the module between vision tower and decoder, for `lora.train_projector`.
        schedule: where its late-fusion student sees vision tokens.
        pyramid: the same with shrinking sets of them, for `recipe=late_fusion_pyramid`.
        visipruner: its calibrated thresholds.
    """

    path: str = MISSING
    revision: str | None = None
    processor: dict[str, Any] = field(default_factory=dict)
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    attention: str | None = None
    projector: str | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    pyramid: ScheduleConfig = field(default_factory=ScheduleConfig)
    visipruner: VisiPrunerConfig = field(default_factory=VisiPrunerConfig)


@dataclass
class PartConfig:
    """A source of a mixture; `weight` is its share of the rows, relative to the others'."""

    source: Source = Source.dataset
    path: str = MISSING
    images: str | None = None
    split: str = "train"
    weight: float = 1.0


@dataclass
class DataConfig:
    """Where samples come from.

    Attributes:
        source: kind of source.
        path: file, dataset folder or hub id (unused by `scenes` and `mixture`).
        images: folder that the image paths in the data are relative to.
        split: to train on; `eval.split` names the one to evaluate on.
        streaming: read rows as they are used, for data that do not fit on the disk; shuffled in a buffer.
        shuffle_buffer: rows in that buffer.
        parts: what a `mixture` is made of.
        eval_path: like `path`, for the evaluation (unused by `scenes`; None: no evaluation of accuracy).
        scenes: how many scenes to render for training (`scenes` only; None: the source's default).
        turns: how many questions about one image a training sample holds at most (`scenes` only).
        isolate: let each turn see the image and itself alone, not the turns before it; for models with plain
            (one number a token) positions, under sdpa or eager attention.
        seed: of rendered scenes, mixtures and streams.
        max_length: the most tokens, vision included, that a sample may have; None: any number.
        too_long: what a longer sample means: `skip` (another takes its place, and it is counted) or `raise`.
            Nothing is ever cut.
        on_error: the same for every other row that cannot be used; `python data/validate.py data=...` lists them.
        group: what the samples of a step have in common: `none`, `length`, or `modality` (and length).
    """

    source: Source = MISSING
    path: str | None = None
    images: str | None = None
    split: str = "train"
    streaming: bool = False
    shuffle_buffer: int = 1000
    parts: list[PartConfig] = field(default_factory=list)
    eval_path: str | None = None
    scenes: int | None = None
    turns: int = 1
    isolate: bool = False
    seed: int = 0
    max_length: int | None = None
    too_long: OnError = OnError.skip
    on_error: OnError = OnError["raise"]
    group: Group = Group.none


@dataclass
class EngineConfig:
    """Who runs the loop.

    Attributes:
        trainer: the file in `training/engines/`.
        deepspeed: a DeepSpeed configuration, or None.
        fsdp: an FSDP configuration of transformers, or None.
        processes: that the run must consist of, asserted at its start; None: as many as the launcher started.
    """

    trainer: Trainer = Trainer.accelerate
    deepspeed: dict[str, Any] | None = None
    fsdp: dict[str, Any] | None = None
    processes: int | None = None


@dataclass
class TrainConfig:
    """The loop. `batch_size` is per device and step of accumulation, `warmup` a fraction of `steps`.

    `narrow` is the fraction of `steps` over which the band narrows from all layers to `schedule` (0: it is fixed).
    `workers` processes load data beside the training process (0: it does so itself), each `prefetch` batches ahead.
    `trackers` names who gets the log beside `metrics.jsonl`: `tensorboard`, `wandb`, `trackio`.
    """

    steps: int = 500
    learning_rate: float = 2e-4
    batch_size: int = 16
    accumulation: int = 1
    warmup: float = 0.03
    narrow: float = 0.0
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    seed: int = 0
    dtype: Dtype = Dtype.auto
    gradient_checkpointing: bool = False
    threads: int | None = None
    workers: int = 0
    prefetch: int = 2
    on_nonfinite: NonFiniteStep = NonFiniteStep.stop
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2


@dataclass
class LoraConfig:
    """Low-rank adapters on the decoder; `targets` None: every linear layer of every decoder layer."""

    variant: Variant = Variant.lora
    layers: Layers = Layers.all
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: list[str] | None = None
    train_projector: bool = False


class EntryInit(Enum):
    """What the entry adapter starts from: `identity`, or `calibrated` (models/calibration.py)."""

    identity = "identity"
    calibrated = "calibrated"


@dataclass
class EntryConfig:
    """The entry adapter; `rank` is that of a `low_rank` one, 0: none.

    `images` of the training set calibrate it, if `init` says so.
    """

    kind: EntryKind = EntryKind.low_rank
    rank: int = 16
    init: EntryInit = EntryInit.identity
    images: int = 256


@dataclass
class KLConfig:
    """Distillation: `weight` times KL(teacher || student) at this temperature.

    Attributes:
        cache: a folder that `training/teach.py` wrote: the teacher's answers are read there, no teacher runs.
        top_k: tokens of the vocabulary that the cache holds of each answer token; what the others have in sum
            is matched too.
    """

    weight: float = 1.0
    temperature: float = 1.0
    cache: str | None = None
    top_k: int = 32


@dataclass
class EvalConfig:
    """The evaluation after training; `samples` None: the whole split."""

    enabled: bool = True
    split: str = "test"
    samples: int | None = None
    batch_size: int = 32


@dataclass
class Config:
    """Everything; `name` is the recipe's, and names the output folder.

    `resume` is true (the newest checkpoint) or a step (the checkpoint of that step).
    """

    name: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    schedule: RunScheduleConfig = field(default_factory=RunScheduleConfig)
    teacher: Teacher = Teacher.visipruner
    tune: Tune = Tune.lora
    init: str | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    entry: EntryConfig = field(default_factory=EntryConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    output_dir: str = MISSING
    resume: bool | int = False
    overwrite: bool = False


ConfigStore.instance().store(name="schema", node=Config)


def read(cfg: DictConfig) -> Config:
    """The composed configuration as a checked `Config`.

    Raises:
        ValueError: a value is missing or out of range.
    """
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{key} is not set; add {key}=VALUE to the command line.")
    config: Config = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    _refuse_additions(config)
    train, lora, kl = config.train, config.lora, config.kl
    for key, value in (
        ("train.steps", train.steps),
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
        ("train.prefetch", train.prefetch),
        ("entry.images", config.entry.images),
        ("schedule.samples", config.schedule.samples),
    ):
        if value < 1:
            raise ValueError(f"{key}={value} must be at least 1.")
    for key, number in (
        ("train.learning_rate", train.learning_rate),
        ("train.max_grad_norm", train.max_grad_norm),
        ("kl.temperature", kl.temperature),
    ):
        if not number > 0:
            raise ValueError(f"{key}={number} must be positive.")
    for key, number in (
        ("train.weight_decay", train.weight_decay),
        ("train.workers", train.workers),
        ("entry.rank", config.entry.rank),
        ("kl.weight", kl.weight),
    ):
        if number < 0:
            raise ValueError(f"{key}={number} must not be negative.")
    for key, number in (
        ("train.warmup", train.warmup),
        ("train.adam_beta2", train.adam_beta2),
        ("lora.dropout", lora.dropout),
        ("train.narrow", 0.0 if train.narrow == 1 else train.narrow),
    ):
        if not 0 <= number < 1:
            raise ValueError(f"{key}={number} must lie in [0, 1).")
    _check_data(config)
    if kl.cache is not None and config.teacher is Teacher.none:
        raise ValueError(
            "kl.cache needs a teacher; use teacher=visipruner or teacher=dense, or leave kl.cache out."
        )
    if config.resume is not False and config.overwrite:
        raise ValueError("resume=true and overwrite=true contradict each other; choose one.")
    if config.engine.deepspeed and config.engine.trainer is not Trainer.accelerate:
        raise ValueError("engine.deepspeed needs engine.trainer=accelerate.")
    if config.engine.deepspeed and train.on_nonfinite is NonFiniteStep.skip:
        raise ValueError(
            "train.on_nonfinite=skip cannot work with DeepSpeed, which has taken the step; use stop."
        )
    if config.entry.init is EntryInit.calibrated and config.entry.rank == 0:
        raise ValueError(
            "entry.init=calibrated needs an entry adapter; set entry.rank to 1 or more, or entry.init=identity."
        )
    if config.tune is Tune.full and config.teacher is not Teacher.none and config.kl.weight > 0:
        raise ValueError(
            f"tune=full leaves no base to be the teacher={config.teacher.value}; use teacher=none, or tune=lora."
        )
    if config.tune is Tune.full and (config.model.load_in_4bit or config.init is not None):
        raise ValueError("tune=full trains the weights themselves: use model.load_in_4bit=false and no init.")
    if (
        config.model.load_in_4bit
        and (config.engine.deepspeed or {}).get("zero_optimization", {}).get("stage") == 3
    ):
        raise ValueError(
            "model.load_in_4bit=true does not go with ZeRO-3, which shards the weights; use ZeRO-2."
        )
    if lora.train_projector and config.model.projector is None:
        raise ValueError(
            "lora.train_projector=true needs model.projector=NAME, the projector's name in this model."
        )
    return config


def _check_data(config: Config) -> None:
    data = config.data
    if data.source in (Source.llava, Source.dataset) and data.path is None:
        raise ValueError(f"data.path is not set; name the {data.source.value} data with data.path=PATH.")
    if data.source is Source.mixture and not data.parts:
        raise ValueError("data.parts is empty; name the mixture's sources: data.parts=[{path: PATH}, ...].")
    for number, part in enumerate(data.parts):
        if part.source not in (Source.llava, Source.dataset):
            raise ValueError(f"data.parts[{number}].source={part.source.value} must be llava or dataset.")
        if not part.weight > 0:
            raise ValueError(f"data.parts[{number}].weight={part.weight} must be positive.")
    if data.streaming and data.source is Source.scenes:
        raise ValueError("data.streaming=true needs data to read: data=dataset or data=mixture.")
    if data.streaming and config.engine.trainer is not Trainer.accelerate:
        raise ValueError("data.streaming=true needs engine.trainer=accelerate.")
    if data.group is not Group.none and (data.streaming or data.source is Source.scenes):
        raise ValueError(
            f"data.group={data.group.value} needs rows that can be measured: data=llava, dataset or mixture, "
            "and data.streaming=false."
        )


def _refuse_additions(node: Any, prefix: str = "") -> None:
    """Hydra's `+key=value` adds keys even to a typed node."""
    exists = sorted(f.name for f in fields(node))
    for name, value in vars(node).items():
        if name not in exists:
            raise ValueError(f"{prefix}{name} does not exist; there are {', '.join(exists)}.")
        if is_dataclass(value):
            _refuse_additions(value, f"{prefix}{name}.")


def explain(overrides: Sequence[str]) -> None:
    """Compose once with these command-line overrides, only to say in one sentence what is wrong with them.

    Raises:
        ValueError: names the bad key or value and what exists.
    """
    with initialize_config_dir(str(RECIPES.resolve()), version_base="1.3"):
        try:
            compose("config", list(overrides))
        except MissingConfigException as error:
            options = ", ".join(error.options or ())
            group, _, choice = (error.missing_cfg_file or "").rpartition("/")
            raise ValueError(f"{group}={choice} does not exist; {group} can be {options}.") from None
        except ConfigCompositionException as error:
            cause = error.__cause__
            if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
                raise ValueError(_unknown_key(str(cause.full_key))) from None
            reason = str(cause).splitlines()[0] if cause else str(error)
            override = str(error).splitlines()[0].removeprefix("Error merging override ")
            raise ValueError(f"{override}: {reason}.") from None


def _unknown_key(key: str) -> str:
    parent, _, name = key.rpartition(".")
    root = compose("config")
    try:
        keys = {str(k) for k in OmegaConf.select(root, parent)} if parent else {"recipe", *map(str, root)}
        exists = sorted(keys)
    except TypeError:  # the parent is itself a value
        return f"{key} does not exist: {parent} is a value."
    near = difflib.get_close_matches(name, exists, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{key} does not exist{hint}; {parent or 'the top level'} has {', '.join(exists)}."
