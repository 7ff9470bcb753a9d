"""How far a run trusts its teacher: measured on the labels before the first step, so that a teacher never harms.

A teacher that does not know the answers would pull the student back to not knowing. One that knows them helps most if
some labels are wrong, and must not step aside at those. So a run asks its teacher some answers first. Wrong labels fall
on answers that it is as sure of as of any other; of what it does not know it is less sure. If it knows most answers and
is as sure where the label differs, the KL of every token counts fully: the label may be wrong. If not, that of a token
counts by the probability that the teacher gives its label.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from scipy.stats import mannwhitneyu
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
KNOWS = 0.7  # share of answers from which on every token's KL may count fully; 20% of wrong labels leave 0.8
SURER = 2 / 3  # chance up to which it does; 0.5 if every label that differs is wrong


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
        known, sure = (
            measure(config, guard, dataset, cached) if offline else ask(config, guard, dataset, load)
        )
        surer = chance_surer(known, sure)
        trusted = known.sum() >= KNOWS * len(known) and (surer is None or surer <= SURER)
        return asdict(Decision("all" if trusted else "labels", int(known.sum()), len(known), surer))

    return Decision(**from_first_process("trust", decide))


def ask(config: Config, guard: Guard, dataset: Any, load: Callable[[], Any]) -> tuple[Tensor, Tensor]:
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
    def choose(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        inputs = dict(batch)
        for name, value in batch.items():
            if isinstance(value, Tensor):
                inputs[name] = value.to(model.device, model.dtype if value.is_floating_point() else None)
        labels, queries = inputs.pop("labels"), inputs.pop("queries")
        columns = label_columns(labels)  # [R]
        with attachment.queries(queries, answers=labels != IGNORE):
            logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits  # [B, R, V]
        logprobs, choices = logits[labels[:, columns + 1] != IGNORE].float().log_softmax(-1).max(-1)  # [N]
        return choices.cpu(), logprobs.exp().cpu()

    try:
        return measure(config, guard, dataset, choose)
    finally:
        attachment.detach()


def cached(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """An offline teacher's first choice for each label, and its probability."""
    return batch["teacher_tokens"][:, 0], batch["teacher_logprobs"][:, 0].exp()


def measure(
    config: Config, guard: Guard, dataset: Any, choose: Callable[[dict[str, Any]], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Which answers of the training set the teacher knows, and how sure it is of each.

    Args:
        choose: the teacher's first choice for each label of a batch, int64 `[N]`, and its probability `[N]`.

    Returns:
        Bool and float32 `[A]`, as in `answers_known`, of ANSWERS answers or a little more, if there are as many.
    """
    known, sure, count = [], [], 0
    for samples in _draw(dataset, config.train.seed, config.train.batch_size):
        batch = guard(samples)
        known_here, sure_here = answers_known(batch["labels"], *choose(batch))
        known.append(known_here)
        sure.append(sure_here)
        count += len(known_here)
        if count >= ANSWERS:
            break
    return torch.cat(known), torch.cat(sure)


def answers_known(labels: Tensor, choices: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Which answers the teacher knows, and how sure it is of its own.

    It knows an answer if its first choice is the label at every token of the answer. It is as sure of one as of its
    first choice at the token where that is least probable.

    Args:
        labels: int64 `[B, T]`; an answer is a stretch of labels.
        choices: int64 `[N]`, a token for each label, sample by sample.
        probabilities: float `[N]`, of the choices.

    Returns:
        Bool and float32 `[A]`, in the order of the answers.
    """
    learnt = labels[:, 1:] != IGNORE  # bool [B, T - 1]
    starts = learnt & ~torch.nn.functional.pad(learnt, (1, -1))
    answer = (
        starts.flatten().cumsum(0).view_as(starts)[learnt] - 1
    )  # int64 [N], a number for each answer of the batch
    total = int(starts.sum())
    right = (choices == labels[:, 1:][learnt]).float()
    known = torch.ones(total).scatter_reduce(0, answer, right, "amin") > 0
    return known, torch.ones(total).scatter_reduce(0, answer, probabilities.float(), "amin")


def chance_surer(known: Tensor, sure: Tensor) -> float | None:
    """Chance that the teacher is surer of an answer it knows than of one it does not; ties count half.

    This is Mann and Whitney's U over the number of pairs; None without a pair.
    """
    yes, no = sure[known], sure[~known]
    if not len(yes) or not len(no):
        return None
    return float(mannwhitneyu(yes.numpy(), no.numpy()).statistic) / (len(yes) * len(no))


def _draw(dataset: Any, seed: int, size: int) -> Iterator[list[Any]]:
    """Batches of samples drawn by the seed; of a stream, its first ones."""
    if isinstance(dataset, Stream):
        samples = first_samples(dataset, SAMPLES)
        yield from (samples[i : i + size] for i in range(0, len(samples), size))
        return
    rows = random.Random(seed).sample(range(len(dataset)), min(SAMPLES, len(dataset)))
    for start in range(0, len(rows), size):
        yield [dataset[row] for row in rows[start : start + size]]
