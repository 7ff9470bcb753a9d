"""Accuracies, differences and their intervals against formulas written out, scipy, and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from latefusion.eval import metrics

answers = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" Yes. ", "yes"), ("top\n  left", "top left"), ("42", "42"), ("a orange", "a orange"), ("", "")],
)
def test_answers_are_compared_without_case_spaces_and_full_stop(answer, right):
    assert metrics.normalise(answer) == right


def test_accuracy_equals_the_formula_written_out():
    scenes = {"a": [1, 1, 0], "b": [1, 0], "c": [1, 1, 1, 1], "d": [0]}
    measure = metrics.accuracy(
        [bool(y) for ys in scenes.values() for y in ys], [s for s, ys in scenes.items() for _ in ys]
    )
    n, clusters, p = 10, 4, 7 / 10
    between = sum((sum(ys) - p * len(ys)) ** 2 for ys in scenes.values())
    effect = (clusters / (clusters - 1) * between / n**2) / (p * (1 - p) / n)
    m, z = n / max(1, effect), stats.t.ppf(0.975, 3)
    centre, root = p + z**2 / (2 * m), z * math.sqrt(p * (1 - p) / m + z**2 / (4 * m**2))
    assert measure.value == p and (measure.n, measure.clusters) == (10, 4)
    assert measure.low == pytest.approx((centre - root) / (1 + z**2 / m))
    assert measure.high == pytest.approx((centre + root) / (1 + z**2 / m))


def test_one_question_a_scene_gives_the_usual_wilson_interval():
    correct = [i % 10 != 0 for i in range(2000)]
    measure = metrics.accuracy(correct, range(2000))
    usual = stats.binomtest(sum(correct), 2000).proportion_ci(method="wilson")
    assert (measure.low, measure.high) == pytest.approx((usual.low, usual.high), abs=1e-4)


def test_asking_the_same_thing_three_times_tells_nothing_new():
    correct = [i % 7 != 0 for i in range(70)]
    once = metrics.accuracy(correct, range(70))
    thrice = metrics.accuracy(correct * 3, list(range(70)) * 3)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))


def test_all_right_is_not_certainty():
    measure = metrics.accuracy([True] * 40, [i // 4 for i in range(40)])
    assert measure.high == 1 and 0.5 < measure.low < 0.8


@settings(max_examples=60, deadline=None)
@given(answers)
def test_intervals_hold_the_estimate_and_do_not_depend_on_order(rows):
    measure = metrics.accuracy([a for a, _, _ in rows], [s for _, _, s in rows])
    assert 0 <= measure.low <= measure.value + 1e-12 and measure.value - 1e-12 <= measure.high <= 1
    again = metrics.accuracy([a for a, _, _ in rows[::-1]], [s for _, _, s in rows[::-1]])
    assert (again.low, again.high) == pytest.approx((measure.low, measure.high))


def beta_scenes(rng, rate, clusters, size, spread=5.0):
    """Answers of scenes that differ in difficulty, bool [clusters, size]."""
    hard = rng.beta(rate * spread, (1 - rate) * spread, clusters)
    return rng.random((clusters, size)) < hard[:, None]


@pytest.mark.parametrize("rate", [0.7, 0.95])
def test_accuracy_intervals_cover(rate):
    rng, scenes, trials = np.random.default_rng(0), np.repeat(np.arange(60), 8), 400
    hits = 0
    for _ in range(trials):
        measure = metrics.accuracy(beta_scenes(rng, rate, 60, 8).ravel().tolist(), scenes.tolist())
        hits += measure.low <= rate <= measure.high
    assert 0.92 <= hits / trials <= 0.985


def test_difference_intervals_cover(monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 399)
    rng, scenes, trials = np.random.default_rng(1), np.repeat(np.arange(60), 8).tolist(), 200
    hits = 0
    for _ in range(trials):
        better = beta_scenes(rng, 0.9, 60, 8)
        worse = better & (rng.random(better.shape) < 0.9)  # loses a tenth of what the better one knows
        difference = metrics.paired(better.ravel().tolist(), worse.ravel().tolist(), scenes).difference
        hits += difference.low <= 0.09 <= difference.high
    assert 0.89 <= hits / trials <= 0.985


def test_paired_counts_mcnemar_and_direction():
    first = [True] * 8 + [False] * 2 + [True] * 30
    second = [False] * 8 + [True] * 2 + [True] * 30
    paired = metrics.paired(first, second, range(40))
    assert (paired.wins, paired.losses) == (8, 2)
    assert paired.mcnemar_p == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert paired.difference.value == pytest.approx(6 / 40)
    assert paired.ratio.value == pytest.approx(38 / 32)
    turned = metrics.paired(second, first, range(40)).difference
    assert (turned.low, turned.high) == pytest.approx((-paired.difference.high, -paired.difference.low))
    assert metrics.paired(first, second, range(40)) == paired  # the seed is fixed


def test_bootstrap_agrees_with_the_normal_interval_on_many_scenes():
    rng = np.random.default_rng(2)
    a, b = beta_scenes(rng, 0.8, 400, 5), beta_scenes(rng, 0.7, 400, 5)
    paired = metrics.paired(a.ravel().tolist(), b.ravel().tolist(), np.repeat(range(400), 5).tolist())
    means = a.mean(1) - b.mean(1)
    half = 1.96 * means.std(ddof=1) / 20
    ends = (paired.difference.low, paired.difference.high)
    assert ends == pytest.approx((means.mean() - half, means.mean() + half), abs=0.1 * half)


def test_equal_answers_are_not_certainty_either():
    paired = metrics.paired([True] * 60, [True] * 60, [i // 2 for i in range(60)])
    assert paired.mcnemar_p == 1
    assert paired.difference.value == 0
    assert paired.difference.high == -paired.difference.low == pytest.approx(1 - 0.025 ** (1 / 30))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: metrics.accuracy([], []), "no answers"),
        (lambda: metrics.accuracy([True], ["a", "b"]), "2 scenes"),
        (lambda: metrics.paired([True], [True, False], ["a"]), "cannot be paired"),
    ],
)
def test_bad_input_is_one_sentence(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
