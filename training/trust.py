"""How far a run trusts its teacher: measured on the labels before the first step, so that a teacher never harms.

A teacher that does not know the answers would pull the student back to not knowing. One that knows them helps most if
some labels are wrong, and must not step aside at those. So a run asks its teacher some answers first. If it knows most
of them, the KL of every token counts fully: where teacher and label differ, the label may be wrong. If not, the KL of a
token counts by the probability that the teacher gives its label.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latefusion.data.bad_rows import Guard
from latefusion.data.collate import IGNORE, label_columns
from latefusion.data.streaming import Stream
from latefusion.models.attach import attach
from latefusion.models.policies.configured import teacher, teaches
from latefusion.recipes.schema import Config, Trust
from latefusion.training.assemble import first_samples, guarded, in_shards
from latefusion.training.prepare import dtype_of, from_first_process
from latefusion.training.teacher import load_teacher
from latefusion.training.trust_record import Decision, read

ANSWERS = 256  # to measure the teacher on, at least: whole batches are asked
SAMPLES = 256  # the most samples to draw for them
KNOWS = 0.7  # share of answers from which on every token's KL counts fully; 20% of wrong labels leave 0.8


def settle_trust(
    config: Config, collator: Any, load: Callable[[], Any], dataset: Any, resumed: Path | None
) -> Decision | None:
    """Decide how the KL counts; None: the run has no teacher.

    The first process measures, with a whole model of its own, before the engine is prepared; all others take its
    decision, so it is the same under every engine. A resumed run keeps the decision it began with. Another teacher
    (`kl.model`) that lies in shards is not asked, and the KL counts by the labels.

    Args:
        collator: of the run; its batches hold the answers of an offline teacher.
        load: loads the base.
    """
    if not teaches(config):
        return None
    offline = config.kl.cache is not None
    if config.kl.trust is not Trust.auto:
        return Decision(config.kl.trust.value)
    if config.kl.model is not None and in_shards(config) and not offline:
        return Decision("labels")

    def decide() -> dict[str, Any]:
        if resumed is not None and (before := read(config.output_dir)) is not None:
            return asdict(before)
        guard = guarded(config, collator, dataset)
        if offline:
            right, answers = measure(config, guard, dataset, lambda batch: batch["teacher_tokens"][:, 0])
        else:
            right, answers = ask(config, guard, dataset, load)
        return asdict(Decision("all" if right >= KNOWS * answers else "labels", right, answers))

    return Decision(**from_first_process("trust", decide))


def ask(config: Config, guard: Guard, dataset: Any, load: Callable[[], Any]) -> tuple[int, int]:
    """Load the teacher and measure it, on a GPU if there is one."""
    policy = teacher(config)
    assert policy is not None
    if config.kl.model is None:
        model = load()
        attachment = attach(model, policy)
    else:
        other = load_teacher(config, policy, dtype=dtype_of(config))
        model, attachment = other.model, other.attachment
    if torch.cuda.is_available() and not config.model.load_in_4bit:  # 4-bit weights are on the GPU already
        model.cuda()

    @torch.no_grad()
    def choose(batch: dict[str, Any]) -> Tensor:
        inputs = dict(batch)
        for name, value in batch.items():
            if isinstance(value, Tensor):
                inputs[name] = value.to(model.device, model.dtype if value.is_floating_point() else None)
        labels, queries = inputs.pop("labels"), inputs.pop("queries")
        columns = label_columns(labels)  # [R]
        with attachment.queries(queries, answers=labels != IGNORE):
            logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits  # [B, R, V]
        return logits[labels[:, columns + 1] != IGNORE].argmax(-1).cpu()  # [N]

    try:
        return measure(config, guard, dataset, choose)
    finally:
        attachment.detach()


def measure(
    config: Config, guard: Guard, dataset: Any, choose: Callable[[dict[str, Any]], Tensor]
) -> tuple[int, int]:
    """How many answers of the training set the teacher knows, out of how many it was asked.

    It knows an answer if its first choice is the label at every token of the answer.

    Args:
        choose: the teacher's first choice for each label of a batch, int64 `[N]`.
    """
    right = answers = 0
    for samples in _draw(dataset, config.train.seed, config.train.batch_size):
        batch = guard(samples)
        right_here, total = answers_right(batch["labels"], choose(batch))
        right, answers = right + right_here, answers + total
        if answers >= ANSWERS:
            break
    return right, answers


def answers_right(labels: Tensor, choices: Tensor) -> tuple[int, int]:
    """Answers whose every token was chosen, and all answers.

    Args:
        labels: int64 `[B, T]`; an answer is a stretch of labels.
        choices: int64 `[N]`, a token for each label, sample by sample.
    """
    learnt = labels[:, 1:] != IGNORE  # bool [B, T - 1]
    wrong = torch.zeros_like(learnt)
    wrong[learnt] = choices != labels[:, 1:][learnt]
    before = torch.nn.functional.pad(learnt, (1, -1))
    starts = learnt & ~before
    answer = starts.flatten().cumsum(0).view_as(starts)  # a number for each answer of the batch
    total = int(starts.sum())
    return total - len(answer[wrong].unique()), total


def _draw(dataset: Any, seed: int, size: int) -> Iterator[list[Any]]:
    """Batches of samples drawn by the seed; of a stream, its first ones."""
    if isinstance(dataset, Stream):
        samples = first_samples(dataset, SAMPLES)
        yield from (samples[i : i + size] for i in range(0, len(samples), size))
        return
    rows = random.Random(seed).sample(range(len(dataset)), min(SAMPLES, len(dataset)))
    for start in range(0, len(rows), size):
        yield [dataset[row] for row in rows[start : start + size]]
