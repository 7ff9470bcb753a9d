"""What `training/train.py` can be told: typed, composed from `recipes/`.

`data` is described in data/config.py, and keys with a few values by name in training/choices.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from latefusion.data.config import DataConfig
from latefusion.training.choices import (
    Dtype,
    EntryInit,
    EntryKind,
    Layers,
    NonFiniteStep,
    Positions,
    Scheduler,
    Teacher,
    Trainer,
    Tune,
    Variant,
)

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass
class ScheduleConfig:
    """A `VisionSchedule`; layers count from 0.

    `keep` is `{layer: k}`, `cross` the layers that read frozen vision tokens, instead of `enter` and `exit`; both are
    untyped, so that an override replaces all of it. `enter` None: nobody has said where, so no run can begin.
    """

    enter: int | None = None
    exit: int | None = None
    keep: Any = None
    cross: Any = None
    positions: Positions = Positions.original


@dataclass
class RunScheduleConfig(ScheduleConfig):
    """The schedule of the run; a profile's replaces `enter`, `exit` and `keep` (docs/profile.md).

    Attributes:
        enter: of a run whose recipe says nothing, the first layer: `recipe=dense`.
        auto: `schedule=auto`: profile the model before training (or read `profile`).
        profile: folder that `eval/profile.py` wrote.
        samples, bound, budget: of the profile that `auto` makes.
    """

    enter: int | None = 0
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
        tuned_for: the `path` that the other settings were chosen for; None: any. With another a run says so.
        revision: branch, tag or commit of a hub id; None: its main branch.
        processor: settings that the processor is loaded with (`max_pixels`, `crop_to_patches`, ...).
        load_in_4bit: hold the decoder in 4 bits (QLoRA); needs bitsandbytes.
        trust_remote_code: run code that comes with the weights.
        attention: the implementation to train with (`eager`, `sdpa`, `flash_attention_2`); None: the
            model's default.
        projector: name of the module between vision tower and decoder, for `lora.train_projector`.
        schedule: where its late-fusion student sees vision tokens.
        pyramid: the same with shrinking sets of them, for `recipe=late_fusion_pyramid`.
        cross: layers that read frozen vision tokens, for `recipe=cross_only`.
        visipruner: its calibrated thresholds.
    """

    path: str = MISSING
    tuned_for: str | None = None
    revision: str | None = None
    processor: dict[str, Any] = field(default_factory=dict)
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    attention: str | None = None
    projector: str | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    pyramid: ScheduleConfig = field(default_factory=ScheduleConfig)
    cross: list[int] = field(default_factory=list)
    visipruner: VisiPrunerConfig = field(default_factory=VisiPrunerConfig)


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
    scheduler: Scheduler = Scheduler.cosine
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
    layers: Layers = Layers.busy
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: list[str] | None = None
    train_projector: bool = False


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
        model: another model to be the teacher, frozen, of the same tokenizer and with the same number of vision
            tokens an image: a hub id or folder; None: the student's own base.
        revision: of `model`.
        visipruner: thresholds of `model`; `model.visipruner` are those of the student's base.
        cache: a folder that `training/teach.py` wrote: the teacher's answers are read there, no teacher runs.
        top_k: tokens of the vocabulary that the cache holds of each answer token; what the others have in sum
            is matched too.
    """

    weight: float = 1.0
    temperature: float = 1.0
    model: str | None = None
    revision: str | None = None
    visipruner: VisiPrunerConfig = field(default_factory=VisiPrunerConfig)
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


SCHEMA = OmegaConf.structured(Config)
OmegaConf.set_struct(SCHEMA.model.processor, False)  # any key may be added: what there are, its class knows
ConfigStore.instance().store(name="schema", node=SCHEMA)
