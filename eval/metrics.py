"""Accuracies and their differences, with 95% intervals that know several questions share a scene.

Answers about one image are not independent: a system that misreads an image misses several of its questions.
So the unit of sampling is the scene (the cluster), and every interval here is made for clusters:

- an accuracy gets a Wilson interval at its *effective* sample size: `n` divided by the design effect, the
  ratio of the between-scene (linearised) variance to the binomial one, never below 1 (Korn and Graubard
  1998; Franco et al. 2019). Unlike a bootstrap it does not collapse to a point when nearly everything is
  right;
- a paired difference or ratio of two systems gets a percentile bootstrap over scenes
  (`scipy.stats.bootstrap`), with McNemar's exact test over questions beside it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval.

    Attributes:
        value: the estimate itself; low, high: ends of the interval.
        n: questions; clusters: scenes they come from.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int


@dataclass(frozen=True)
class Paired:
    """Two systems on the same questions: `first - second` and `first / second` of their accuracies.

    Attributes:
        difference, ratio: with bootstrap intervals over scenes.
        wins, losses: questions that only the first, only the second answered right.
        mcnemar_p: two-sided exact test that wins and losses are as likely; it counts questions as
            independent.
    """

    difference: Estimate
    ratio: Estimate
    wins: int
    losses: int
    mcnemar_p: float


def normalise(answer: str) -> str:
    """Lower case, single spaces, no space or full stop at the ends; what exact match compares."""
    return re.sub(r"\s+", " ", answer).strip(" .").lower()


def accuracy(correct: Sequence[bool], scenes: Sequence[object]) -> Estimate:
    """Share of right answers with a Wilson interval at the effective sample size.

    The quantile is Student's t with `clusters - 1` degrees of freedom. Where all answers are right (or all
    wrong) the design effect cannot be estimated, and the number of scenes is the sample size, which is the
    safe side.

    Args:
        correct: one entry a question; scenes: the scene each belongs to.

    Raises:
        ValueError: there is no question.
    """
    right, size = _per_scene(np.asarray(correct, dtype=float), scenes)
    n, clusters = float(size.sum()), len(size)
    p = float(right.sum() / n)
    effective = float(clusters)
    if 0 < p < 1 and clusters > 1:
        variance = clusters / (clusters - 1) * np.square(right - p * size).sum() / n**2
        effective = n / max(1.0, variance / (p * (1 - p) / n))
    z = float(stats.t.ppf((1 + LEVEL) / 2, max(clusters - 1, 1)))
    middle = (p + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * np.sqrt(p * (1 - p) / effective + (z / (2 * effective)) ** 2)
    return Estimate(p, max(0.0, float(middle - half)), min(1.0, float(middle + half)), int(n), clusters)


def paired(
    first: Sequence[bool], second: Sequence[bool], scenes: Sequence[object], *, seed: int = 0
) -> Paired:
    """How much better `first` is than `second` on the same questions.

    Where no scene tells the two apart a bootstrap would claim certainty; there the interval is the share of
    scenes that could differ unseen (`1 - 0.025 ** (1 / clusters)`, either way).

    Raises:
        ValueError: the lists differ in length, or are empty.
    """
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} and {len(second)} answers cannot be paired; give both the same questions."
        )
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    right_a, size = _per_scene(a, scenes)
    right_b, _ = _per_scene(b, scenes)
    wins, losses = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    test = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return Paired(
        difference=_bootstrap(right_a - right_b, size, size, seed),
        ratio=_bootstrap(right_a, right_b, size, seed),
        wins=wins,
        losses=losses,
        mcnemar_p=float(test),
    )


def _per_scene(values: NDArray, scenes: Sequence[object]) -> tuple[NDArray, NDArray]:
    """Sum of `values` and number of questions of each scene, `[scenes]` each."""
    if len(values) == 0:
        raise ValueError("there are no answers to score; give at least one question.")
    if len(values) != len(scenes):
        raise ValueError(f"{len(values)} answers but {len(scenes)} scenes; name the scene of every answer.")
    _, index = np.unique(np.asarray([str(scene) for scene in scenes]), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def _bootstrap(top: NDArray, bottom: NDArray, size: NDArray, seed: int) -> Estimate:
    """`sum(top) / sum(bottom)` over scenes, percentile bootstrap."""
    n, clusters = int(size.sum()), len(size)
    total = bottom.sum()
    if total == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), n, clusters)
    value = float(top.sum() / total)
    spread = top - value * bottom
    if clusters < 2 or not spread.any():
        unseen = 1 - ((1 - LEVEL) / 2) ** (1 / clusters)
        return Estimate(value, value - unseen, value + unseen, n, clusters)

    def statistic(top: NDArray, bottom: NDArray, axis: int) -> NDArray:
        below = bottom.sum(axis)
        return np.divide(top.sum(axis), below, out=np.full(below.shape, np.nan), where=below > 0)

    found = stats.bootstrap(
        (top, bottom),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=1000,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high), n, clusters)
