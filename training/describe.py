"""The lines a run prints before its first step."""

from __future__ import annotations

from typing import Any

import torch

from latefusion.data.bad_rows import usable
from latefusion.data.collate import IGNORE
from latefusion.data.streaming import Stream
from latefusion.models.schedule import VisionSchedule
from latefusion.models.student.build import Student
from latefusion.models.student.entry import entry_of
from latefusion.recipes.launcher import world_size
from latefusion.recipes.schema import Config, ModelConfig, Teacher
from latefusion.training.assemble import dtype_of
from latefusion.training.estimate import estimated, numel
from latefusion.training.teacher import OtherTeacher

DESCRIBED = 8  # samples whose sizes the printed lines speak of


def first_samples(dataset: Any) -> list[Any]:
    """The first samples of a training set, opened; `Bad` where a row cannot be used."""
    if isinstance(dataset, Stream):
        return [usable(row) for row in dataset.first(DESCRIBED)]
    return [dataset[i] for i in range(min(DESCRIBED, len(dataset)))]


def describe(
    config: Config, student: Student, batch: dict[str, Any], other: OtherTeacher | None = None
) -> str:
    """What is about to be trained: parameters, vision tokens by layer, FLOPs against dense."""
    model, schedule = student.model, student.schedule
    ids, n = batch["input_ids"], len(batch["input_ids"])
    prompt = torch.arange(ids.shape[1]) <= batch["queries"][:, :1]  # bool [B, T]: up to the first answer
    vision = ids == model.config.image_token_id
    n_vision, n_text = (round(int((prompt & part).sum()) / n) for part in (vision, ~vision))
    total = sum(numel(p) for p in model.parameters())
    trainable = sum(numel(p) for p in model.parameters() if p.requires_grad)
    real = ids != student.processor.tokenizer.pad_token_id
    masks = (real & ~vision, vision, batch["labels"] != IGNORE)
    all_text, all_vision, learnt = (round(int(mask.sum()) / n) for mask in masks)
    layers = model.config.get_text_config().num_hidden_layers
    entry: Any = entry_of(model)
    flops = schedule.flops(model.config, n_text, n_vision) + (
        entry.flops(n_vision) if schedule.enter and entry else 0
    )
    dense = VisionSchedule().flops(model.config, n_text, n_vision)
    train = config.train
    dtype = str(dtype_of(config)).removeprefix("torch.")
    return "\n".join(
        [
            *borrowed(config.model),
            *unknown_words(batch["labels"], student.processor.tokenizer),
            f"{config.name}: {trainable / 1e6:.2f}M of {total / 1e6:.1f}M parameters train, "
            f"{train.steps} steps of {train.batch_size} x {train.accumulation} samples in "
            f"{world_size()} process(es), teacher {config.teacher.value}"
            f"{f' of {config.kl.model}' if config.kl.model else ''}{' (offline)' if config.kl.cache else ''}, {dtype}",
            f"vision tokens by layer: {runs(schedule.vision_tokens(layers, n_vision))}"
            f"{', frozen: keys and values alone' if schedule.cross else ''}",
            f"decoder FLOPs a prompt: {flops / 1e9:.2f}G, {flops / dense:.1%} of dense "
            f"({n_vision} vision + {n_text} text tokens)",
            estimated(
                config,
                model,
                schedule,
                (all_text, all_vision, learnt),
                dtype_of(config),
                teacher_of(config, model, other),
            ),
        ]
    )


def unknown_words(labels: torch.Tensor, tokenizer: Any) -> list[str]:
    """A line that says so, if answers (int64 `[B, T]`) hold words that the tokenizer does not know."""
    unknown, learnt = tokenizer.unk_token_id, int((labels != IGNORE).sum())
    count = 0 if unknown is None else int((labels == unknown).sum())
    if not count:
        return []
    return [
        f"{count} of the {learnt} answer tokens of the first samples are {tokenizer.unk_token}: words that this "
        "model's tokenizer does not know, and the student learns to answer with it."
    ]


def borrowed(model: ModelConfig) -> list[str]:
    """A line that says so, if another model's settings are about to be used."""
    if model.tuned_for in (None, model.path):
        return []
    return [
        f"note: band, keeps, VisiPruner's thresholds and training settings that you did not give are those of "
        f"model={model.tuned_for}, chosen for it; for {model.path} take its configuration (model=...), or model=other, "
        "which borrows nothing."
    ]


def teacher_of(config: Config, model: Any, other: OtherTeacher | None) -> Any:
    """The model that teaches in every step, if one does."""
    if config.teacher is Teacher.none or config.kl.weight == 0 or config.kl.cache is not None:
        return None
    return model if other is None else other.model


def runs(tokens: list[int]) -> str:
    """`[0, 0, 144, 144, 16]` as `0-1: 0, 2-3: 144, 4: 16`."""
    starts = [i for i, n in enumerate(tokens) if i == 0 or n != tokens[i - 1]]
    ends = [*(i - 1 for i in starts[1:]), len(tokens) - 1]
    return ", ".join(
        f"{a}: {tokens[a]}" if a == b else f"{a}-{b}: {tokens[a]}" for a, b in zip(starts, ends, strict=True)
    )
