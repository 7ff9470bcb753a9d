"""What `data=...` can be told; read without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


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
        eval_path: like `path` (no JSON), questions and answers for the evaluation (unused by `scenes`; None: none).
        scenes: how many scenes to render for training (`scenes` only; None: the source's default).
        turns: how many questions about one image a training sample holds at most (`scenes` only).
        isolate: let each turn see the image and itself alone, not the turns before it; for models with plain
            (one number a token) positions, under sdpa or eager attention.
        pack: let the samples of a batch without images share rows, each seeing itself alone, so that no padding is
            computed; `group=modality` makes such batches.
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
    pack: bool = False
    seed: int = 0
    max_length: int | None = None
    too_long: OnError = OnError.skip
    on_error: OnError = OnError["raise"]
    group: Group = Group.none
