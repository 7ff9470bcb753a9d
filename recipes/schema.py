"""Every key of a run's configuration, with its type: what `training/train.py` accepts, composed from `recipes/`.

First come the keys that take one of a few names, then `data`, then the rest. `Config` at the end holds them all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

RECIPES = Path(__file__).parent

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
"""The names for `train.trackers`, each with the packages of which it needs one."""


class Teacher(Enum):
    """Policy of the teacher, which is the base or `kl.model`; `none`: no distillation."""

    visipruner = "visipruner"
    dense = "dense"
    none = "none"


class Trust(Enum):
    """Whether the run keeps its teacher.

    `all`: it teaches every token. `auto`: the run asks it some answers of the training set first, and trains without a
    teacher unless it knows better than the labels (training/trust.py).
    """

    auto = "auto"
    all = "all"


class Tune(Enum):
    """Which weights train.

    `lora`: adapters on the decoder, the entry adapter, and the projector if `lora.train_projector`. `align`: only
    projector and entry adapter. `full`: decoder, output head, projector and entry adapter; the base is then gone and
    cannot teach (`teacher=none`, or `kl.model`).
    """

    lora = "lora"
    align = "align"
    full = "full"


class Variant(Enum):
    """Kind of LoRA. `rslora` scales by `alpha / sqrt(r)` (arXiv 2312.03732), `dora` learns magnitudes (2402.09353)."""

    lora = "lora"
    rslora = "rslora"
    dora = "dora"


class Layers(Enum):
    """Decoder layers that get LoRA: `busy`, those in which the schedule has vision tokens, or `all`."""

    all = "all"
    busy = "busy"


class EntryKind(Enum):
    """Kind of the entry adapter. `scale`: one factor per channel; `low_rank`: that and a low-rank map."""

    none = "none"
    scale = "scale"
    low_rank = "low_rank"


class EntryInit(Enum):
    """What the entry adapter starts from: `identity`, or `calibrated` (models/student/entry_fit.py)."""

    identity = "identity"
    calibrated = "calibrated"


class Scheduler(Enum):
    """The learning rate after the warm-up, by transformers' names."""

    linear = "linear"
    cosine = "cosine"
    cosine_with_restarts = "cosine_with_restarts"
    polynomial = "polynomial"
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"
    inverse_sqrt = "inverse_sqrt"


class Trainer(Enum):
    """Library that runs the training loop."""

    accelerate = "accelerate"
    lightning = "lightning"


class Dtype(Enum):
    """Number format of weights and compute. `auto`: bfloat16 if the hardware computes in it, else float32."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class NonFiniteStep(Enum):
    """What to do with a step whose loss or gradient is not finite."""

    stop = "stop"
    skip = "skip"


class Source(Enum):
    """Kind of data.

    `scenes`, `icons`: rendered on this machine; `easy_vqa`: of a package; `llava`: a LLaVA conversation JSON;
    `dataset`: columns messages and images; `mixture`: several of the last two, by weight.
    """

    scenes = "scenes"
    icons = "icons"
    easy_vqa = "easy_vqa"
    llava = "llava"
    dataset = "dataset"
    mixture = "mixture"


QUESTION_SETS = (Source.scenes, Source.icons, Source.easy_vqa)
"""Those that need no `data.path`: questions with one answer each, and splits of their own."""

OnError = Enum("OnError", {"skip": "skip", "raise": "raise"})
"""For rows that cannot be used: `skip` puts another in its place and counts it, `raise` stops the run."""


class Group(Enum):
    """What the samples of a step have in common. `modality`: all with images or all without, and similar lengths."""

    none = "none"
    length = "length"
    modality = "modality"


@dataclass
class PartConfig:
    """A source of a mixture; `weight` is its share of the rows, relative to those of the others.

    Attributes:
        max_frames: in place of `data.max_frames`.
    """

    source: Source = Source.dataset
    path: str = MISSING
    images: str | None = None
    split: str = "train"
    weight: float = 1.0
    max_frames: int | None = None


@dataclass
class DataConfig:
    """Where samples come from.

    Attributes:
        source: kind of source.
        path: file, dataset folder or hub id (unused by `mixture`, and by `scenes`, `icons` and `easy_vqa`).
        images: folder that the image and video paths in the data are relative to.
        max_frames: the most frames of a video that the model is shown, evenly spaced from its first to its last.
        split: split to train on; `eval.split` names the one to evaluate on.
        streaming: read rows as they are used, for data that do not fit on the disk; they are shuffled in a buffer.
        shuffle_buffer: rows in that buffer.
        parts: the sources of a `mixture`.
        eval_path: questions and answers for the evaluation: a file as `eval/evaluate.py data=FILE` takes it, a folder,
            or a hub id. None: those of the set itself (`scenes`, `icons`, `easy_vqa`), else no evaluation.
        scenes: how many images to train on (`scenes`, `icons`, `easy_vqa`; None: the set's usual number).
        turns: the most questions about one image in a training sample (these three only).
        noise: share of the training rows that get a wrong answer, another row's of the same type (these three only).
        isolate: let each turn see the image and itself alone, not the turns before it; for the
            models that docs/families.md names, under sdpa or eager attention. Under `schedule.keep` or VisiPruner, the
            questions of a row then rank its vision tokens together; without it, the text before the first answer does.
        pack: let the samples of a batch share rows, each seeing itself alone, so that less padding is computed.
            Batches with images keep a row a sample under flash attention, DeepSpeed, FSDP and in Gemma 3.
        seed: for rendered scenes, mixtures and streams.
        max_length: the most tokens, vision included, that a sample may have; None: any number.
        too_long: what to do with a longer sample: `skip` or `raise`. No sample is ever cut.
        on_error: what to do with every other row that cannot be used; `python data/validate.py data=...` lists them.
        group: what the samples of a step have in common: `none`, `length`, or `modality` (and length).
    """

    source: Source = MISSING
    path: str | None = None
    images: str | None = None
    max_frames: int = 16
    split: str = "train"
    streaming: bool = False
    shuffle_buffer: int = 1000
    parts: list[PartConfig] = field(default_factory=list)
    eval_path: str | None = None
    scenes: int | None = None
    turns: int = 1
    noise: float = 0.0
    isolate: bool = False
    pack: bool = False
    seed: int = 0
    max_length: int | None = None
    too_long: OnError = OnError.skip
    on_error: OnError = OnError["raise"]
    group: Group = Group.none


@dataclass
class ScheduleConfig:
    """A `VisionSchedule`; layers count from 0.

    Attributes:
        enter: first layer that sees vision tokens; None: unknown, so that no run can begin.
        exit: first layer that no longer sees them; None: the last one still does.
        keep: `{layer: k}`: from this layer on, the best k. Untyped, so that an override replaces all of it.
        cross: layers that read frozen vision tokens, instead of `enter` and `exit`.
        ranking, freeze_prefix: see models/schedule.py (`question`, `reading` or `hidrop`).
    """

    enter: int | None = None
    exit: int | None = None
    keep: Any = None
    cross: Any = None
    ranking: str = "question"
    freeze_prefix: bool = False


@dataclass
class RunScheduleConfig(ScheduleConfig):
    """The schedule of the run; that of a profile replaces `enter`, `exit`, `keep` and `ranking` (docs/profile.md).

    Attributes:
        enter: 0 for a recipe without a schedule: `recipe=dense`.
        auto: `schedule=auto`: profile the model before training (or read `profile`).
        profile: a folder written by `eval/profile_model.py`.
        samples, confirm, bound, budget: arguments of the profile that `auto` makes.
    """

    enter: int | None = 0
    auto: bool = False
    profile: str | None = None
    samples: int = 128
    confirm: int = 1536
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
    """A base model, and what is known about where it fuses.

    Attributes:
        path: `embedded`, a hub id, or a local folder.
        tuned_for: the `path` for which the other settings were chosen; a run says so if it has another. None: any.
        revision: branch, tag or commit of a hub id; None: its main branch.
        processor: settings to load the processor with (`max_pixels`, `crop_to_patches`, ...).
        load_in_4bit: hold the decoder in 4 bits (QLoRA); needs bitsandbytes.
        trust_remote_code: run code that comes with the weights.
        attention: the implementation to train with (`eager`, `sdpa`, `flash_attention_2`); None: the
            model's default.
        projector: name of the module between vision tower and decoder, for `lora.train_projector`.
        schedule: where its late-fusion student sees vision tokens.
        pyramid: the same with fewer and fewer vision tokens, for `recipe=late_fusion_pyramid`.
        cross: layers that read frozen vision tokens, for `recipe=cross_only`.
        visipruner: its calibrated thresholds.
        teacher: the policy under which it teaches: `dense` if nobody has calibrated those thresholds.
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
    teacher: Teacher = Teacher.visipruner


@dataclass
class EngineConfig:
    """Who runs the training loop.

    Attributes:
        trainer: the file in `training/engines/`.
        deepspeed: a DeepSpeed configuration, or None.
        fsdp: an FSDP configuration of transformers, or None.
        processes: the number of processes that the run must have, checked at its start; None: any number.
    """

    trainer: Trainer = Trainer.accelerate
    deepspeed: dict[str, Any] | None = None
    fsdp: dict[str, Any] | None = None
    processes: int | None = None

    @property
    def in_shards(self) -> bool:
        """Whether weights are spread over the processes."""
        stage = (self.deepspeed or {}).get("zero_optimization", {}).get("stage")
        return stage == 3 or bool(self.fsdp)


@dataclass
class TrainConfig:
    """How long and how fast the student learns; the numbers of a run are in `recipes/train/`.

    Attributes:
        steps: optimizer steps; None: as many as `epochs` take.
        epochs: passes over the training set; None: `steps` says how long the run is. A command line that sets one of
            the two puts the other aside.
        learning_rate: its peak, after the warm-up.
        batch_size: samples per device and micro-batch.
        accumulation: micro-batches per device and step.
        warmup: the fraction of the steps in which the learning rate rises to its peak.
        narrow: the fraction of the steps over which the band narrows from all layers to `schedule`; 0: it is fixed.
        workers: processes that load data; 0: the training process does so itself.
        prefetch: batches that each worker loads ahead.
        trackers: where the log goes beside `metrics.jsonl`: `tensorboard`, `wandb`, `trackio`.
    """

    steps: int | None = None
    epochs: float | None = 1.0
    learning_rate: float = MISSING
    batch_size: int = MISSING
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

    @property
    def total_steps(self) -> int:
        """The steps of the run, which `training/prepare.py` counts once the training set is open."""
        assert self.steps is not None
        return self.steps


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
    """The entry adapter.

    Attributes:
        rank: of a `low_rank` adapter; 0: no adapter.
        images: number of images of the training set that calibrate it, if `init` says so.
        later: frozen tokens (`schedule.cross`) are calibrated for each layer that reads them, not for the first alone.
        later_rank: of the maps that do so; from half the hidden size on whole matrices. None: the smallest power of two
            that explains images it was not fitted on as well.
    """

    kind: EntryKind = EntryKind.low_rank
    rank: int = 16
    init: EntryInit = EntryInit.identity
    images: int = 256
    later: bool = True
    later_rank: int | None = None


@dataclass
class KLConfig:
    """Distillation from a teacher's answers.

    Attributes:
        weight: of KL(teacher || student) beside the cross-entropy; 0: no distillation.
        temperature: divides the logits of both before the KL, which then counts `temperature` squared times.
        trust: whether the run asks first what the teacher is worth.
        share: of the steps that the teacher runs in, evenly spaced; there the KL counts `1 / share` times, so that the
            sum over a run is expected to be that of a teacher in every step.
        model: another model as the teacher, a hub id or folder. It is frozen, and has the student's tokenizer and
            number of vision tokens per image. None: the student's own base.
        revision: of `model`.
        visipruner: thresholds for `model`; `model.visipruner` has those for the student's base.
        cache: a folder written by `training/teach.py`: the teacher's answers are read there, and no teacher runs.
        top_k: number of likeliest tokens that the cache holds for each answer token; the others count by their sum.
    """

    weight: float = 1.0
    temperature: float = 1.0
    trust: Trust = Trust.auto
    share: float = 1.0
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
    """The whole configuration of a run.

    Attributes:
        name: of the recipe, and of the output folder.
        init: folder of a student to start from.
        resume: true: go on from the newest checkpoint; a step: from the checkpoint of that step.
        overwrite: replace the run in the output folder.
    """

    name: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    schedule: RunScheduleConfig = field(default_factory=RunScheduleConfig)
    teacher: Teacher = "${model.teacher}"  # type: ignore[assignment]
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
OmegaConf.set_struct(SCHEMA.model.processor, False)  # takes any key: the processor's class knows which exist
ConfigStore.instance().store(name="schema", node=SCHEMA)
