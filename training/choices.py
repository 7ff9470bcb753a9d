"""Keys of the configuration that take one of a few names, and what each name means."""

from __future__ import annotations

from enum import Enum

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
"""Of `train.trackers`, each with the packages any of which it needs."""


class Teacher(Enum):
    """The policy of the teacher (the same weights, adapters off, or `kl.model`); `none`: no distillation."""

    visipruner = "visipruner"
    dense = "dense"
    none = "none"


class Tune(Enum):
    """What trains: `lora`: adapters on the decoder, entry adapter, and the projector if `lora.train_projector`;
    `align`: projector and entry adapter alone; `full`: decoder, output head, projector and entry adapter, no adapters,
    and so no base to teach (`teacher=none`, or `kl.model`)."""

    lora = "lora"
    align = "align"
    full = "full"


class Variant(Enum):
    """`rslora`: arXiv 2312.03732; `dora`: arXiv 2402.09353."""

    lora = "lora"
    rslora = "rslora"
    dora = "dora"


class Layers(Enum):
    """Decoder layers with LoRA: the `busy` ones, in which vision tokens take part under the schedule, or `all`."""

    all = "all"
    busy = "busy"


class Positions(Enum):
    """What RoPE counts where vision tokens are missing: the model's own positions, or the tokens that are there."""

    original = "original"
    reindexed = "reindexed"


class EntryKind(Enum):
    """Of the entry adapter; `scale`: one factor a channel, `low_rank`: that and a low-rank map."""

    none = "none"
    scale = "scale"
    low_rank = "low_rank"


class EntryInit(Enum):
    """What the entry adapter starts from: `identity`, or `calibrated` (models/calibration.py)."""

    identity = "identity"
    calibrated = "calibrated"


class Scheduler(Enum):
    """How the learning rate goes on after the warm-up, by transformers' names."""

    linear = "linear"
    cosine = "cosine"
    cosine_with_restarts = "cosine_with_restarts"
    polynomial = "polynomial"
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"
    inverse_sqrt = "inverse_sqrt"


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
