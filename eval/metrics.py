"""Accuracies and their differences, with 95% intervals that know several questions share a scene.

Answers about one image are not independent: a system that misreads an image misses several of its questions.
So the unit of sampling is the scene (the cluster), and every interval here is made for clusters:

- an accuracy gets a Wilson interval at its *effective* sample size: `n` divided by the design effect, the
  ratio of the between-scene (linearised) variance to the binomial one, never below 1 (Korn and Graubard
  1998; Franco et al. 2019). Unlike a bootstrap it does not collapse to a point when nearly everything is
  right;
- a paired difference or ratio of two systems, and every figure that is not a plain mean (an F1, MME's scores), gets a
  percentile bootstrap over scenes, the same draws for both systems; beside a difference stands McNemar's exact test.

A score is a number from 0 to 1 (VQA's and ANLS's are fractions); "right" is at least one half. Over several tasks, the
figures are unweighted means over tasks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999
FEW = 1000  # scenes; from here on as many resamples are enough
AT_ONCE = 100  # draws of many scenes held in memory


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
    """Two systems on the same questions: `first - second` and `first / second` of their scores.

    Attributes:
        difference, ratio: with bootstrap intervals over scenes.
        wins, losses: questions on which the first, the second scores higher.
        mcnemar_p: two-sided exact test that wins and losses are as likely (McNemar's where scores are 0 or 1, else a
            sign test); it counts questions as independent.
    """

    difference: Estimate
    ratio: Estimate
    wins: int
    losses: int
    mcnemar_p: float


@dataclass(frozen=True)
class Spread:
    """Median with quartiles, of a system and of its ratio to the reference in the same round."""

    median: float
    q25: float
    q75: float
    ratio: float
    ratio_q25: float
    ratio_q75: float


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A published figure: `scale` times a sum of ratios `sum(top) / sum(bottom)`, each over the questions.

    Attributes:
        terms: pairs of `[n]` numbers a question; a term whose bottom is empty counts 0.
        scale: 100 for a percentage; most: the best value there is.
    """

    terms: Sequence[tuple[Sequence[float], Sequence[float]]] = field(repr=False)
    scale: float = 100
    most: float = 100


def normalise(answer: str) -> str:
    """Lower case, single spaces, no space or full stop at the ends; what exact match compares."""
    return re.sub(r"\s+", " ", answer).strip(" .").lower()


def spread(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """Quartiles of values (such as seconds), and of their ratios to the reference's of the same round."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    ratio_low, ratio, ratio_high = np.quantile(np.divide(values, reference), [0.25, 0.5, 0.75])
    return Spread(float(middle), float(low), float(high), float(ratio), float(ratio_low), float(ratio_high))


def accuracy(scores: Sequence[float], scenes: Sequence[object]) -> Estimate:
    """Mean score with a Wilson interval at the effective sample size.

    The quantile is Student's t with `clusters - 1` degrees of freedom. Where all answers are right (or all
    wrong) the design effect cannot be estimated, and the number of scenes is the sample size, which is the
    safe side; so is a binomial variance for scores between 0 and 1.

    Args:
        scores: one entry a question; scenes: the scene each belongs to.

    Raises:
        ValueError: there is no question.
    """
    right, size = _per_scene(np.asarray(scores, dtype=float), scenes)
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


def mean_of_tasks(
    scores: Sequence[float], scenes: Sequence[object], tasks: Sequence[str], *, seed: int = 0
) -> Estimate:
    """`accuracy` if there is one task, else the unweighted mean over tasks, bootstrapped over the scenes of each."""
    if len(set(tasks)) == 1:
        return accuracy(scores, scenes)
    a = np.asarray(scores, dtype=float)
    values, draws, clusters = _task_means([a], scenes, tasks, seed)
    low, high = _ends(draws[0])
    return Estimate(float(values[0]), low, high, len(a), clusters)


def paired(
    first: Sequence[float],
    second: Sequence[float],
    scenes: Sequence[object],
    *,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
) -> Paired:
    """How much better `first` is than `second` on the same questions.

    Where no scene tells the two apart a bootstrap would claim certainty; there the interval is the share of
    scenes that could differ unseen (`1 - 0.025 ** (1 / clusters)`, either way).

    Args:
        tasks: the task of each question; None: there is one.

    Raises:
        ValueError: the lists differ in length, or are empty.
    """
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} and {len(second)} answers cannot be paired; give both the same questions."
        )
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    (x, y), (drawn_x, drawn_y), clusters = _task_means([a, b], scenes, tasks or [""] * len(a), seed)
    wins, losses = int((a > b).sum()), int((a < b).sum())
    test = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = drawn_x / drawn_y
        ratio = float(x / y) if y else float("nan")
    return Paired(
        difference=_around(float(x - y), drawn_x - drawn_y, len(a), clusters),
        ratio=_around(ratio, ratios, len(a), clusters),
        wins=wins,
        losses=losses,
        mcnemar_p=float(test),
    )


def measure(found: Measure, scenes: Sequence[object], *, seed: int = 0) -> Estimate:
    """A published figure with its bootstrap interval over scenes."""
    columns = [np.asarray(column, dtype=float) for term in found.terms for column in term]
    sums = np.stack([_per_scene(column, scenes)[0] for column in columns])  # [2 terms, scenes]

    def figure(totals: NDArray) -> NDArray:
        top, bottom = totals[0::2], totals[1::2]
        return found.scale * np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0).sum(0)

    value = float(figure(sums.sum(1)))
    low, high = _ends(figure(_resampled(sums, seed))) if sums.shape[1] > 1 else (0.0, found.most)
    return Estimate(value, low, high, len(columns[0]), sums.shape[1])


def _per_scene(values: NDArray, scenes: Sequence[object]) -> tuple[NDArray, NDArray]:
    """Sum of `values` and number of questions of each scene, `[scenes]` each."""
    if len(values) == 0:
        raise ValueError("there are no answers to score; give at least one question.")
    if len(values) != len(scenes):
        raise ValueError(f"{len(values)} answers but {len(scenes)} scenes; name the scene of every answer.")
    _, index = np.unique(np.asarray([str(scene) for scene in scenes]), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def _task_means(
    scores: Sequence[NDArray], scenes: Sequence[object], tasks: Sequence[str], seed: int
) -> tuple[NDArray, NDArray, int]:
    """Mean over tasks of each list's mean score `[m]`, the same in every draw `[m, R]`, and the scenes in all."""
    if len(scores[0]) == 0:
        raise ValueError("there are no answers to score; give at least one question.")
    label, at = np.asarray(tasks), np.asarray([str(scene) for scene in scenes])
    if len(at) != len(scores[0]):
        raise ValueError(f"{len(scores[0])} answers but {len(at)} scenes; name the scene of every answer.")
    values, draws, clusters = [], [], 0
    for number, name in enumerate(dict.fromkeys(tasks)):
        chosen = label == name
        found = [_per_scene(score[chosen], at[chosen]) for score in scores]
        sums = np.stack([right for right, _ in found] + [found[0][1]])  # [m + 1, scenes]
        total = sums.sum(1)
        values.append(total[:-1] / total[-1])
        drawn = _resampled(sums, seed + number)
        draws.append(drawn[:-1] / drawn[-1])
        clusters += sums.shape[1]
    return np.mean(values, 0), np.mean(draws, 0), clusters


def _resampled(sums: NDArray, seed: int) -> NDArray:
    """Totals `[m, R]` of `sums` `[m, scenes]` over as many scenes, drawn with replacement."""
    clusters = sums.shape[1]
    if clusters <= FEW:
        return sums @ _counts(clusters, RESAMPLES, seed).T
    rng, resamples = np.random.default_rng(seed), min(RESAMPLES, FEW)  # nearly normal by then
    parts = [min(AT_ONCE, resamples - start) for start in range(0, resamples, AT_ONCE)]
    return np.concatenate([sums @ _draw(rng, clusters, part).T for part in parts], axis=1)


@lru_cache(maxsize=32)
def _counts(clusters: int, resamples: int, seed: int) -> NDArray:
    """How often each draw holds each scene, `[R, scenes]`: the same for all systems of a run."""
    return _draw(np.random.default_rng(seed), clusters, resamples).astype(np.float32)


def _draw(rng: np.random.Generator, clusters: int, resamples: int) -> NDArray:
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)


def _around(value: float, draws: NDArray, n: int, clusters: int) -> Estimate:
    if np.isnan(value):
        return Estimate(value, value, value, n, clusters)
    if np.ptp(draws[np.isfinite(draws)]) < 1e-12:
        unseen = 1 - ((1 - LEVEL) / 2) ** (1 / clusters)
        return Estimate(value, value - unseen, value + unseen, n, clusters)
    return Estimate(value, *_ends(draws), n, clusters)


def _ends(draws: NDArray) -> tuple[float, float]:
    with np.errstate(invalid="ignore"):  # between two infinite ratios: not a number, which is what it is
        low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
