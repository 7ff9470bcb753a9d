"""Whether a run has a teacher: measured on the labels before the first step, so that a teacher never harms.

A teacher that does not know the answers would pull the student back to not knowing. One that agrees with every label
adds nothing to them but its cost. What gains is a teacher that knows better than the labels: some are wrong, and it is
as sure of its own answers there as of any other, while of what it does not know it is less sure. So a run asks its
teacher some answers first, no more than it takes, and trains without it unless it knows better.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest, mannwhitneyu
from torch import Tensor

from latefusion.data.bad_rows import Guard
from latefusion.data.collate import IGNORE, label_columns
from latefusion.data.streaming import Stream
from latefusion.models.attach import attach
from latefusion.models.policies.configured import teacher, teaches
from latefusion.recipes.launcher import world_size
from latefusion.recipes.schema import Config, Teacher, Trust
from latefusion.training.assemble import first_samples, guarded
from latefusion.training.prepare import dtype_of, from_first_process
from latefusion.training.teacher import load_teacher
from latefusion.training.trust_record import KNOWS, Decision, read

SAMPLES = 256  # the most to ask the teacher
OF_THE_RUN = 10  # and no more than one of so many samples of the run, but a batch


def settle_trust(
    config: Config,
    collator: Any,
    load: Callable[[], Any],
    dataset: Any,
    resumed: Path | None,
    *,
    offline: bool = False,
) -> Decision | None:
    """Decide whether the run keeps its teacher, and set `config.teacher` to none if not; None: it has none.

    The first process measures, with a whole model of its own, before the engine is prepared; all others take its
    decision, so it is the same under every engine. A resumed run keeps the decision it began with.

    Args:
        collator: of the run; its batches hold the answers of an offline teacher.
        load: loads the base.
        offline: the answers come with the batches.
    """
    if not teaches(config):
        return None

    def decide() -> dict[str, Any]:
        if resumed is not None and (before := read(config.output_dir)) is not None:
            return asdict(before)
        guard = guarded(config, collator, dataset)
        known, sure = (
            measure(config, guard, dataset, cached) if offline else ask(config, guard, dataset, load)
        )
        return asdict(Decision.of(int(known.sum()), len(known), chance_surer(known, sure)))

    auto = config.kl.trust is Trust.auto
    decision = Decision(**from_first_process("trust", decide)) if auto else Decision(config.kl.trust.value)
    if decision.trust == "none":
        config.teacher = Teacher.none
    return decision


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

    It is asked batch by batch, until the share that it knows is outside of `KNOWS` beyond doubt.

    Args:
        choose: the teacher's first choice for each label of a batch, int64 `[N]`, and its probability `[N]`.

    Returns:
        Bool and float32 `[A]`, as in `answers_known`.
    """
    train = config.train
    known, sure = torch.zeros(0, dtype=torch.bool), torch.zeros(0)
    samples = train.total_steps * train.batch_size * train.accumulation * world_size() // OF_THE_RUN
    for drawn in _draw(dataset, train.seed, train.batch_size, max(train.batch_size, min(SAMPLES, samples))):
        batch = guard(drawn)
        more = answers_known(batch["labels"], *choose(batch))
        known, sure = torch.cat([known, more[0]]), torch.cat([sure, more[1]])
        if len(known) and outside(int(known.sum()), len(known)):
            break
    return known, sure


def outside(right: int, answers: int) -> bool:
    """Whether the share that is known is below or above `KNOWS` by its 95% interval (Wilson)."""
    share = binomtest(right, answers).proportion_ci(method="wilson")
    return share.high < KNOWS[0] or share.low > KNOWS[1]


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


def _draw(dataset: Any, seed: int, size: int, count: int) -> Iterator[list[Any]]:
    """Batches of `count` samples drawn by the seed; of a stream, its first ones."""
    if isinstance(dataset, Stream):
        samples = first_samples(dataset, count)
        yield from (samples[i : i + size] for i in range(0, len(samples), size))
        return
    rows = random.Random(seed).sample(range(len(dataset)), min(count, len(dataset)))
    for start in range(0, len(rows), size):
        yield [dataset[row] for row in rows[start : start + size]]
