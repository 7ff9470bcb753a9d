"""Accuracies and their differences, with 95% intervals that know several questions share an image.

Answers about one image are not independent: a system that misreads an image misses several of its questions.
So the unit of sampling is the image (the cluster), and every interval here is made for clusters:

- an accuracy gets a Wilson interval at its *effective* sample size: `n` divided by the design effect, the
  ratio of the between-image (linearised) variance to the binomial one, never below 1 (Korn and Graubard
  1998; Franco et al. 2019). It does not collapse to a point when everything is right;
- a difference of two systems on the same questions gets Tango's score interval for paired proportions (1998) at the
  effective number of pairs. Near 100%, where few pairs differ, a bootstrap's lower end lies too high: it misses 6 to
  18% of the time instead of 2.5 (`eval/bench/intervals.py` simulates both). Beside it stands McNemar's exact test;
- a mean over tasks is combined from the tasks' own intervals (the method of variance estimates recovery, Zou and
  Donner 2008), with the correlation that images shared by tasks cause;
- a figure that is not a plain mean (an F1, MME's scores) gets Wilson's interval at the size that its linearised
  variance between images amounts to.

A score is a number from 0 to 1 (VQA's and ANLS's are fractions); "right" is at least one half. Over several tasks, the
figures are unweighted means over tasks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval.

    Attributes:
        value: the estimate itself; low, high: ends of the interval.
        n: questions; clusters: images they are about.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int


@dataclass(frozen=True)
class Paired:
    """Two systems on the same questions.

    Attributes:
        difference: `first - second` of their mean scores.
        wins, losses: questions on which the first, the second scores higher.
        mcnemar_p: two-sided exact test that wins and losses are as likely (McNemar's where scores are 0 or 1, else a
            sign test); it counts questions as independent.
    """

    difference: Estimate
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
        scale: 100 for a percentage; most: the best possible value.
    """

    terms: Sequence[tuple[Sequence[float], Sequence[float]]] = field(repr=False)
    scale: float = 100
    most: float = 100


def normalise(answer: str) -> str:
    """Lower case, single spaces, no space or full stop at the ends; what exact match compares."""
    return re.sub(r"\s+", " ", answer).strip(" .").lower()


def quartiles(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float, float]:
    """25%, 50% and 75% quantiles of values."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def spread(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """Quartiles of values (such as seconds), and of their ratios to the reference's of the same round."""
    low, middle, high = quartiles(values)
    ratio_low, ratio, ratio_high = quartiles(np.divide(values, reference))
    return Spread(middle, low, high, ratio, ratio_low, ratio_high)


def accuracy(scores: Sequence[float], clusters: Sequence[object]) -> Estimate:
    """Mean score with a Wilson interval at the effective sample size.

    The quantile is Student's t with `clusters - 1` degrees of freedom. Where all answers are right (or all
    wrong) the design effect cannot be estimated, and the number of images is the sample size, which is the
    safe side; so is a binomial variance for scores between 0 and 1.

    Args:
        scores: one entry a question; clusters: the image that each is about.

    Raises:
        ValueError: there is no question.
    """
    index, count = _index(scores, clusters)
    return _accuracy(np.asarray(scores, dtype=float), index, count)[0]


def mean_of_tasks(scores: Sequence[float], clusters: Sequence[object], tasks: Sequence[str]) -> Estimate:
    """`accuracy` if there is one task, else the unweighted mean over tasks.

    Args:
        tasks: the task of each question; an image that several tasks ask about has one name in `clusters`.
    """
    index, count = _index(scores, clusters)
    values = np.asarray(scores, dtype=float)
    return _combined([_accuracy(values[of], index[of], count) for of in _by_task(tasks)], index)


def paired(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[object],
    *,
    tasks: Sequence[str] | None = None,
) -> Paired:
    """How much better `first` is than `second` on the same questions.

    Args:
        tasks: the task of each question; None: all are of one.

    Raises:
        ValueError: the lists differ in length, or are empty.
    """
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} and {len(second)} answers cannot be paired; give both the same questions."
        )
    index, count = _index(first, clusters)
    gaps = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    wins, losses = int((gaps > 0).sum()), int((gaps < 0).sum())
    test = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    parts = [_difference(gaps[of], index[of], count) for of in _by_task(tasks or [""] * len(gaps))]
    return Paired(_combined(parts, index), wins=wins, losses=losses, mcnemar_p=float(test))


def measure(figure: Measure, clusters: Sequence[object]) -> Estimate:
    """A published figure with its interval.

    Of its share of the best possible value the linearised variance between images is taken, and Wilson's interval at
    the sample size which that variance amounts to, at most the number of questions.
    """
    index, count = _index(figure.terms[0][0], clusters)
    columns = [[np.asarray(column, dtype=float) for column in term] for term in figure.terms]
    used = [(top, bottom) for top, bottom in columns if bottom.sum() > 0]
    share, influence, weights = 0.0, np.zeros(count), np.zeros(count)
    factor = figure.scale / figure.most
    for top, bottom in used:
        ratio, total = top.sum() / bottom.sum(), bottom.sum()
        share += factor * ratio
        influence += factor * np.bincount(index, top - ratio * bottom, count) / total
        weights += np.bincount(index, bottom, count) / total / len(used)
    share = min(max(float(share), 0.0), 1.0)
    variance = _variance(influence, int((weights > 0).sum()))
    size = (
        1 / float(np.square(weights).sum()) if used else 1.0
    )  # all right: as if each image were one question
    if 0 < share < 1 and variance > 0:
        size = min(share * (1 - share) / variance, float(len(index)))
    low, high = _wilson(share, size, count)
    return Estimate(figure.most * share, figure.most * low, figure.most * high, len(index), count)


Part = tuple[Estimate, NDArray, NDArray]  # of a task: estimate, influence and weight of each cluster `[C]`


def _index(values: Sequence[float], clusters: Sequence[object]) -> tuple[NDArray, int]:
    """The number of each question's cluster, and how many clusters there are."""
    if len(values) == 0:
        raise ValueError("there are no answers to score; give at least one question.")
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} answers but {len(clusters)} images; name the image of every answer.")
    names, index = np.unique(np.asarray([str(name) for name in clusters]), return_inverse=True)
    return index, len(names)


def _by_task(tasks: Sequence[str]) -> list[NDArray]:
    """Row numbers of each task, in the order in which the tasks come."""
    labels = np.asarray(tasks)
    return [np.flatnonzero(labels == name) for name in dict.fromkeys(tasks)]


def _accuracy(values: NDArray, index: NDArray, count: int) -> Part:
    n, clusters, mean = len(values), len(np.unique(index)), float(values.mean())
    influence = np.bincount(index, values - mean, count) / n
    size = float(clusters)
    if 0 < mean < 1 and clusters > 1:
        size = n / max(1.0, _variance(influence, clusters) / (mean * (1 - mean) / n))
    estimate = Estimate(mean, *_wilson(mean, size, clusters), n, clusters)
    return estimate, influence, np.bincount(index, minlength=count) / n


def _difference(gaps: NDArray, index: NDArray, count: int) -> Part:
    """Tango's interval at the effective number of pairs; where no pair differs, the number of images is taken for it.

    Scores between 0 and 1 win and lose by parts of a pair, which is the safe side.
    """
    n, clusters, mean = len(gaps), len(np.unique(index)), float(gaps.mean())
    influence = np.bincount(index, gaps - mean, count) / n
    wins, losses = float(gaps.clip(min=0).sum()), float((-gaps).clip(min=0).sum())
    independent = ((wins + losses) / n - mean**2) / n  # the variance if no questions shared an image
    effect = n / clusters
    if independent > 0 and clusters > 1:
        effect = max(1.0, _variance(influence, clusters) / independent)
    low, high = _tango(wins / effect, losses / effect, n / effect, _quantile(clusters))
    return Estimate(mean, low, high, n, clusters), influence, np.bincount(index, minlength=count) / n


def _combined(parts: Sequence[Part], index: NDArray) -> Estimate:
    """The mean of several tasks' estimates, from the distances of their limits and the correlations between tasks."""
    if len(parts) == 1:
        return parts[0][0]
    estimates = [estimate for estimate, _, _ in parts]
    value = float(np.mean([e.value for e in estimates]))
    correlations = np.array([[_correlation(a, b) for b in parts] for a in parts])
    below = np.array([e.value - e.low for e in estimates])
    above = np.array([e.high - e.value for e in estimates])
    low, high = (float(np.sqrt(max(side @ correlations @ side, 0.0))) / len(parts) for side in (below, above))
    questions = sum(e.n for e in estimates)
    return Estimate(value, value - low, value + high, questions, len(np.unique(index)))


def _correlation(first: Part, second: Part) -> float:
    """Correlation of two tasks' estimates: 0 if they share no image.

    Where one of them does not vary between images (all right), it is taken to be as large as the images they share
    allow, which is the safe side.
    """
    (_, a, weights_a), (_, b, weights_b) = first, second
    if a.any() and b.any():
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))
    return float(weights_a @ weights_b / np.sqrt((weights_a @ weights_a) * (weights_b @ weights_b)))


def _variance(influence: NDArray, clusters: int) -> float:
    """Variance of an estimate to which the clusters contribute `influence`; 0 for one cluster."""
    return clusters / (clusters - 1) * float(np.square(influence).sum()) if clusters > 1 else 0.0


def _quantile(clusters: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, max(clusters - 1, 1)))


def _wilson(p: float, size: float, clusters: int) -> tuple[float, float]:
    z = _quantile(clusters)
    middle = (p + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * np.sqrt(p * (1 - p) / size + (z / (2 * size)) ** 2)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _tango(wins: float, losses: float, n: float, z: float) -> tuple[float, float]:
    """Limits of `(wins - losses) / n`: the differences that the score test does not reject (Tango 1998)."""

    def score(gap: float) -> float:
        b = (2 * n - wins + losses) * gap - wins - losses
        lost = (np.sqrt(max(b * b + 8 * n * losses * gap * (1 - gap), 0.0)) - b) / (
            4 * n
        )  # its likeliest rate
        variance = n * (2 * lost + gap * (1 - gap))
        surplus = wins - losses - n * gap
        return surplus / np.sqrt(variance) if variance > 0 else np.inf * np.sign(surplus)

    value, least = (wins - losses) / n, 1e-12
    low, high = -1.0, 1.0
    if value > -1 + least and score(-1 + least) > z:
        low = optimize.brentq(lambda gap: score(gap) - z, -1 + least, value - least)
    if value < 1 - least and score(1 - least) < -z:
        high = optimize.brentq(lambda gap: score(gap) + z, value + least, 1 - least)
    return float(low), float(high)
